"""What the tests of all attention kinds share: inputs, gradients, steps in a row, memory, and the formulas of
the kinds other than Flow-Attention, quadratic in length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl.attention import flow_attention_step, naive_flow_attention
from flowrl.attention.linear import (
    EPS,
    FEATURES_PER_DIMENSION,
    MAX_TOKENS,
    SMALLEST_NORMALISER,
    random_directions,
)


def tokens(length, *, batch=1, heads=2, head_dim=8, value_dim=5, seed=0, dtype=torch.float64):
    """Queries, keys, values and a weight on the outputs, (batch, heads, length, width) each."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, width) for width in (head_dim, head_dim, value_dim, value_dim)]
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(attention, queries, keys, values, weight, **options):
    """The outputs, and the gradients of their weighted sum by queries, keys and values."""
    inputs = [tensor.clone().requires_grad_() for tensor in (queries, keys, values)]
    output = attention(*inputs, **options)
    (output * weight).sum().backward()
    return output.detach(), *(tensor.grad for tensor in inputs)


def computed_by(form):
    """Causal Flow-Attention by a form's own ``forward`` and ``backward`` (a module: cpu, triton)."""

    def attention(queries, keys, values, *, clamp=10.0, eps=1e-6):
        return _Form.apply(form, queries, keys, values, clamp, eps)

    return attention


class _Form(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, queries, keys, values, clamp, eps):
        results = form.forward((queries, keys, values), clamp, eps, True)
        ctx.save_for_backward(queries, keys, values, *results)
        ctx.form, ctx.options = form, (clamp, eps)
        return results[0]

    @staticmethod
    def backward(ctx, g_outputs):
        queries, keys, values, *results = ctx.saved_tensors
        gradients = ctx.form.backward((queries, keys, values), g_outputs, tuple(results), *ctx.options)
        return None, *gradients, None, None


def stepped(queries, keys, values, step=flow_attention_step, **options):
    """The outputs of a step function over all tokens, (batch, heads, length, value_dim)."""
    outputs, state = [], None
    for token in range(queries.shape[2]):
        output, state = step(queries[:, :, token], keys[:, :, token], values[:, :, token], state, **options)
        outputs.append(output)
    return torch.stack(outputs, dim=2)


def assert_all_close(actual, expected, tolerance):
    """Compare what :func:`with_gradients` returns, relative to the largest value where that is above 1."""
    for name, a, b in zip(("output", "query", "key", "value"), actual, expected, strict=True):
        difference = (a.double() - b.double()).abs().max().item()
        scale = max(1.0, b.abs().max().item())
        assert difference <= tolerance * scale, f"{name}: {difference}"  # a NaN fails too


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def saved_by(attention, length, head_dim):
    """Bytes that the forward pass keeps for the backward pass, and the largest tensor of both (elements)."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = tokens(length, heads=1, head_dim=head_dim, value_dim=head_dim, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), LargestTensor() as largest:
        with_gradients(attention, *inputs)
    return sum(storages.values()), largest.elements


def naive_linear_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(elu(q) + 1) . (elu(k) + 1) as weights, for (batch, heads, length, head_dim) tensors."""
    return _weighted_mean((F.elu(queries) + 1) @ (F.elu(keys) + 1).mT, values)


def naive_performer_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Products of positive random features as weights, without any measure against overflow."""
    head_dim = queries.shape[-1]
    w = random_directions(head_dim, FEATURES_PER_DIMENSION * head_dim).to(queries)
    x, y = queries / head_dim**0.25, keys / head_dim**0.25
    query_features = (x @ w.mT - x.square().sum(-1, keepdim=True) / 2).exp()
    query_features = query_features / query_features.sum(-1, keepdim=True) + EPS
    key_features = (y @ w.mT - y.square().sum(-1, keepdim=True) / 2).exp() + EPS
    return _weighted_mean(query_features @ key_features.mT, values)


def naive_cosformer_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, max_tokens: int = MAX_TOKENS
) -> Tensor:
    """relu(q) . relu(k) cos(pi/2 (i - j) / M) as weights."""
    positions = torch.arange(queries.shape[-2], dtype=queries.dtype, device=queries.device)
    positions = positions.clamp(max=max_tokens)
    distances = positions[:, None] - positions  # (length, length), i - j
    reweighted = torch.cos(math.pi / 2 * distances / max_tokens)
    return _weighted_mean(queries.relu() @ keys.relu().mT * reweighted, values)


def naive_softmax_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Exponentials of q . k / sqrt(head_dim) as weights, without any measure against overflow."""
    return _weighted_mean((queries @ keys.mT / queries.shape[-1] ** 0.5).exp(), values)


def _weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    past = weights.tril()  # (batch, heads, length, length), 0 where j > i
    return past @ values / past.sum(-1, keepdim=True).clamp(min=SMALLEST_NORMALISER)


NAIVE = {
    "flow": naive_flow_attention,
    "softmax": naive_softmax_attention,
    "linear": naive_linear_attention,
    "performer": naive_performer_attention,
    "cosformer": naive_cosformer_attention,
}

"""Causal linear attention: what every kind that is nothing but a feature map shares.

Output i is the sum over j <= i of (f(q_i) . g(k_j)) v_j, divided by the sum of the same weights; f and g are
the kind's features, non-negative up to rounding. Source: Katharopoulos et al. 2020 (arXiv 2006.16236).

A kind gives ``features(queries, keys, positions)``, where positions (counted from 0) broadcast against all
but the last dimension of queries and keys, and gets its parallel form and its step from here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FeatureMap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

ONE_BLOCK = 128  # tokens up to which one block does the whole job
SHORTEST_BLOCK = 64  # else a block of as many tokens as features: Gram matrix and memory cost the same
GROUP_TOKENS = 32_768  # tokens times sequences handled together: more amortise overhead, fewer fit the cache
SMALLEST_NORMALISER = 1e-8  # where all weights vanish, a ReLU's for instance, the output is 0


class LinearState(NamedTuple):
    """Everything that linear attention remembers of the past; constant in size, float32 or float64."""

    num_tokens: Tensor  # (batch, heads), tokens seen
    sum_keys: Tensor  # (batch, heads, features), sum of g(k_j)
    memory: Tensor  # (batch, heads, features, value_dim), sum of g(k_j) v_j^T


def causal_linear_attention(queries: Tensor, keys: Tensor, values: Tensor, features: FeatureMap) -> Tensor:
    """The parallel form, linear in length in time and memory.

    ``queries`` and ``keys`` are (batch, heads, length, head_dim), ``values`` (batch, heads, length,
    value_dim). Returns (batch, heads, length, value_dim) in the dtype of ``values``; sums are float32
    (float64 for float64 input) whatever the autocast state. Raises ValueError for shapes that do not fit.
    """
    _check_shapes(queries, keys, values, dimensions=4)
    with torch.autocast(queries.device.type, enabled=False):
        dtype = _accumulation_dtype(queries.dtype)
        positions = torch.arange(queries.shape[-2], dtype=dtype, device=queries.device)
        q, k = features(queries.to(dtype), keys.to(dtype), positions)  # (batch, heads, length, features)
        counted = F.pad(values.to(dtype), (0, 1), value=1.0)  # a last column of ones sums the weights
        sums = CausalProduct.apply(q, k, counted)
        outputs = sums[..., :-1] / sums[..., -1:].clamp(min=SMALLEST_NORMALISER)
    return outputs.to(values.dtype)


def causal_linear_attention_step(
    query: Tensor, key: Tensor, value: Tensor, state: LinearState | None, features: FeatureMap
) -> tuple[Tensor, LinearState]:
    """The recurrent form: one token in, one out, in constant time and memory.

    ``query`` and ``key`` are (batch, heads, head_dim), ``value`` is (batch, heads, value_dim); ``state`` is
    None before the first token. Returns the output (batch, heads, value_dim) and the new state. Raises
    ValueError for shapes that do not fit.
    """
    _check_shapes(query, key, value, dimensions=3)
    with torch.autocast(query.device.type, enabled=False):
        dtype = _accumulation_dtype(query.dtype)
        num_tokens = query.new_zeros(query.shape[:2], dtype=dtype) if state is None else state.num_tokens
        q, k = features(query.to(dtype), key.to(dtype), num_tokens)  # (batch, heads, features)
        sum_keys, memory = k, k[..., :, None] * value.to(dtype)[..., None, :]
        if state is not None:
            sum_keys, memory = state.sum_keys + sum_keys, state.memory + memory
        normaliser = (q * sum_keys).sum(-1, keepdim=True).clamp(min=SMALLEST_NORMALISER)
        output = (q[..., None, :] @ memory)[..., 0, :] / normaliser
    return output.to(value.dtype), LinearState(num_tokens + 1, sum_keys, memory)


class CausalProduct(torch.autograd.Function):
    """``apply(q, k, v)`` -> sum over j <= i of (q_i . k_j) v_j, for (batch, heads, length, width) tensors.

    Within a block by its masked Gram matrix, from earlier blocks by the prefix sums of k^T v. The gradient is
    the same product in three other orders, so nothing but the inputs is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        blocks = _Blocks(q, v)
        parts = [
            _product(qs, ks, vs, blocks.per_sequence)
            for qs, ks, vs in zip(*(blocks.cut(x) for x in (q, k, v)), strict=True)
        ]
        return blocks.join(parts, v.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        blocks = _Blocks(q, v)
        with torch.autocast(q.device.type, enabled=False):
            parts = [
                _product_backward(qs, ks, vs, gs, blocks.per_sequence)
                for qs, ks, vs, gs in zip(*(blocks.cut(x) for x in (q, k, v, gradient)), strict=True)
            ]
        g_q, g_k, g_v = zip(*parts, strict=True)
        return blocks.join(g_q, q.shape), blocks.join(g_k, k.shape), blocks.join(g_v, v.shape)


class _Blocks:
    """How (batch, heads, length, width) tensors are cut into groups of (M, C, width) blocks, and joined."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        length, features = q.shape[-2:]
        self.block = length if length <= ONE_BLOCK else max(features, SHORTEST_BLOCK)
        self.per_sequence = -(-length // self.block)
        self.padding = self.per_sequence * self.block - length  # zeros add nothing to any sum
        self.sequences = max(GROUP_TOKENS // (self.per_sequence * self.block), 1)  # in a group

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.padding:
            x = F.pad(x, (0, 0, 0, self.padding))
        x = x.reshape(-1, self.block, x.shape[-1])
        return x.split(self.sequences * self.per_sequence)

    def join(self, parts: list[Tensor] | tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.view(*shape[:2], -1, shape[-1])[:, :, : shape[2]]


def _product(q: Tensor, k: Tensor, v: Tensor, blocks: int) -> Tensor:
    """(M, C, features) and (M, C, width) tensors, ``blocks`` consecutive ones to a sequence."""
    output = torch.bmm(torch.bmm(q, k.mT).tril_(), v)
    return output if blocks == 1 else output.baddbmm_(q, _sums_before(torch.bmm(k.mT, v), blocks))


def _product_backward(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.bmm(q, k.mT).tril_()  # (M, C, C)
    g_weights = torch.bmm(gradient, v.mT).tril_()
    g_q, g_k, g_v = torch.bmm(g_weights, k), torch.bmm(g_weights.mT, q), torch.bmm(weights.mT, gradient)
    if blocks > 1:
        before = _sums_before(torch.bmm(k.mT, v), blocks)  # (M, features, width)
        after = _sums_before(torch.bmm(q.mT, gradient).flip(0), blocks).flip(0)
        g_q.baddbmm_(gradient, before.mT)
        g_k.baddbmm_(v, after.mT)
        g_v.baddbmm_(k, after)
    return g_q, g_k, g_v


def _sums_before(each: Tensor, blocks: int) -> Tensor:
    """(M, ...) -> the sum over the earlier blocks of the same sequence, (M, ...)."""
    each = each.unflatten(0, (-1, blocks))
    running = torch.cat((torch.zeros_like(each[:, :1]), each[:, :-1]), dim=1)
    return running.cumsum_(1).flatten(0, 1)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_shapes(queries: Tensor, keys: Tensor, values: Tensor, dimensions: int) -> None:
    fit = (
        queries.ndim == values.ndim == dimensions
        and queries.shape == keys.shape
        and queries.shape[:-1] == values.shape[:-1]
        and queries.numel() > 0
    )
    if not fit:
        shapes = f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}"
        raise ValueError(f"linear attention takes {dimensions}-dimensional tensors that fit, got {shapes}")

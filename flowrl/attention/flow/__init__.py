"""Flow-Attention for training and acting: the parallel causal form, the bidirectional form, and the step.

Notation follows Flowformer (arXiv 2202.06258): q are sinks and k sources after their sigmoid, I and O the
incoming and outgoing flow, n_i = i the number of tokens seen. ``naive.py`` holds the plain formula.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl.attention.flow.blocks import CausalFlowBlocks
from flowrl.attention.flow.cpu import native_flow_attention, native_supports
from flowrl.attention.flow.triton import triton_flow_attention, triton_supports

ONE_BLOCK = 128  # tokens up to which one block does the whole job
SHORTEST_BLOCK = 32  # otherwise blocks as long as head_dim: the Gram matrix then costs what the memory does
ONE_GROUP = 12_288  # tokens times sequences up to which all are handled together
GROUP_TOKENS = 4_096  # otherwise groups of so many: more overflow the cache, fewer amortise less


class FlowState(NamedTuple):
    """Everything the causal form remembers of the past; constant in size. All tensors float32 or float64."""

    num_tokens: Tensor  # (batch, heads) tokens seen, n
    sum_keys: Tensor  # (batch, heads, head_dim)
    sum_queries: Tensor  # (batch, heads, head_dim)
    weighted_keys: Tensor  # (batch, heads, head_dim), sum of (n_j / O_j) k_j
    weighted_queries: Tensor  # (batch, heads, head_dim), sum of (n_i / I_i) q_i
    sum_exponentials: Tensor  # (batch, heads), sum of exp(conserved source)
    memory: Tensor  # (batch, heads, head_dim, value_dim), sum of k_j (C_j v_j)^T


def empty_flow_state(query: Tensor, value: Tensor) -> FlowState:
    """Return the state before the first token, for tensors whose first two dimensions are (batch, heads)."""
    batch, heads, head_dim, value_dim = *query.shape[:2], query.shape[-1], value.shape[-1]
    dtype = _accumulation_dtype(query.dtype)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, heads, *shape, dtype=dtype, device=query.device)

    return FlowState(
        zeros(),
        zeros(head_dim),
        zeros(head_dim),
        zeros(head_dim),
        zeros(head_dim),
        zeros(),
        zeros(head_dim, value_dim),
    )


def flow_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool = True,
    clamp: float = 10.0,
    eps: float = 1e-6,
) -> Tensor:
    """Flow-Attention, linear in length in time and memory.

    Args:
        queries, keys: (batch, heads, length, head_dim), **before** the sigmoid.
        values: (batch, heads, length, value_dim).
        causal: sums over the past only, as in the paper's reinforcement-learning experiments; otherwise
            the bidirectional Eq. 4-9, where queries and keys may differ in length.
        clamp: bound on the conserved source flow before its exponential.
        eps: added to every component where the formula divides by a flow.

    Returns (batch, heads, length, value_dim) in the dtype of ``values``. Sums are float32 (float64 for
    float64 input) whatever the autocast state. Raises ValueError for shapes that do not fit.
    """
    _check_shapes(queries, keys, values, causal)
    if causal and triton_supports(queries, keys, values):
        return triton_flow_attention(queries, keys, values, clamp=clamp, eps=eps)
    with torch.autocast(queries.device.type, enabled=False):
        dtype = _accumulation_dtype(queries.dtype)
        q, k, v = queries.to(dtype), keys.to(dtype), values.to(dtype)
        if causal and native_supports(q, k, v):
            outputs = native_flow_attention(q, k, v, clamp=clamp, eps=eps)
        elif causal:
            outputs = _causal(q, k, v, clamp, eps)
        else:
            outputs = _bidirectional(q.sigmoid(), k.sigmoid(), v, clamp, eps)
    return outputs.to(values.dtype)


def flow_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: FlowState | None = None,
    *,
    clamp: float = 10.0,
    eps: float = 1e-6,
) -> tuple[Tensor, FlowState]:
    """The recurrent form: one token in, one out, in constant time and memory.

    ``query`` and ``key`` are (batch, heads, head_dim), before the sigmoid; ``value`` is (batch, heads,
    value_dim); ``state`` is None before the first token. Returns the output (batch, heads, value_dim) and the
    new state. Raises ValueError for shapes that do not fit.
    """
    if query.ndim != 3 or query.shape != key.shape or query.shape[:2] != value.shape[:2] or value.ndim != 3:
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        raise ValueError(f"flow_attention_step takes (batch, heads, head_dim) tensors, got {shapes}")
    with torch.autocast(query.device.type, enabled=False):
        if state is None:
            state = empty_flow_state(query, value)
        dtype = state.memory.dtype
        q, k, v = query.to(dtype).sigmoid(), key.to(dtype).sigmoid(), value.to(dtype)
        qe, ke = q + eps, k + eps
        n = state.num_tokens + 1
        sum_keys, sum_queries = state.sum_keys + k, state.sum_queries + q
        incoming = (qe * (sum_keys + eps)).sum(-1)
        outgoing = (ke * (sum_queries + eps)).sum(-1)
        weighted_keys = state.weighted_keys + (n / outgoing)[..., None] * k
        weighted_queries = state.weighted_queries + (n / incoming)[..., None] * q
        conserved_sink = (qe * (weighted_keys + eps)).sum(-1) / n
        conserved_source = (ke * (weighted_queries + eps)).sum(-1) / n
        exponential = conserved_source.clamp(-clamp, clamp).exp()
        sum_exponentials = state.sum_exponentials + exponential
        competition = n * exponential / sum_exponentials
        memory = state.memory + k[..., :, None] * (competition[..., None] * v)[..., None, :]
        scale = conserved_sink.sigmoid() / incoming
        output = ((scale[..., None] * q)[..., None, :] @ memory)[..., 0, :]
    new_state = FlowState(n, sum_keys, sum_queries, weighted_keys, weighted_queries, sum_exponentials, memory)
    return output.to(value.dtype), new_state


def _causal(queries: Tensor, keys: Tensor, values: Tensor, clamp: float, eps: float) -> Tensor:
    """Walk over groups of whole blocks, then the shorter last block: nothing is ever padded."""
    batch, heads, length, head_dim = queries.shape
    block = length if length <= ONE_BLOCK else max(head_dim, SHORTEST_BLOCK)
    together = ONE_GROUP if batch * heads * length <= ONE_GROUP else GROUP_TOKENS
    group = max(together // (batch * heads * block), 1)  # blocks
    sizes, left = [], length  # tokens of each group
    while left > 0:
        blocks = max(min(left // block, group), 1)
        sizes.append(min(blocks * block, left))
        left -= sizes[-1]
    state: tuple[Tensor | None, ...] = (None,) * len(FlowState._fields)
    if len(sizes) == 1:
        inputs = (queries, keys, values)
        return CausalFlowBlocks.apply(*inputs, max(length // block, 1), False, clamp, eps, *state)[0]
    outputs = []
    # split, not slices: the gradient of each slice would be as long as the whole sequence.
    parts = zip(*(x.split(sizes, dim=2) for x in (queries, keys, values)), strict=True)
    for index, (size, part) in enumerate(zip(sizes, parts, strict=True)):
        goes_on = index + 1 < len(sizes)
        output, *state = CausalFlowBlocks.apply(*part, max(size // block, 1), goes_on, clamp, eps, *state)
        outputs.append(output)
    return torch.cat(outputs, dim=-2)


def _bidirectional(q: Tensor, k: Tensor, v: Tensor, clamp: float, eps: float) -> Tensor:
    num_sinks, num_sources = q.shape[-2], k.shape[-2]
    qe, ke = q + eps, k + eps
    incoming = qe @ (k.sum(-2) + eps)[..., None]  # (batch, heads, sinks, 1), Eq. 4
    outgoing = ke @ (q.sum(-2) + eps)[..., None]  # (batch, heads, sources, 1)
    conserved_sink = qe @ ((k / outgoing).sum(-2) + eps)[..., None]  # Eq. 7
    conserved_source = ke @ ((q / incoming).sum(-2) + eps)[..., None]
    competition = num_sources * conserved_source.clamp(-clamp, clamp).softmax(dim=-2)  # Eq. 8
    memory = k.transpose(-1, -2) @ (competition * v)  # (batch, heads, head_dim, value_dim)
    return (conserved_sink * (num_sinks / num_sources)).sigmoid() / incoming * (q @ memory)  # Eq. 9


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_shapes(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> None:
    shapes = f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}"
    if queries.ndim != 4 or keys.ndim != 4 or values.ndim != 4:
        raise ValueError(f"flow_attention takes (batch, heads, length, head_dim) tensors, got {shapes}")
    if queries.shape[:2] != keys.shape[:2] or queries.shape[-1] != keys.shape[-1]:
        raise ValueError(f"queries and keys differ in batch, heads or head_dim: {shapes}")
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"keys and values differ in batch, heads or length: {shapes}")
    if causal and queries.shape[-2] != keys.shape[-2]:
        raise ValueError(f"causal attention takes as many queries as keys, got {shapes}")
    if queries.shape[-2] == 0 or keys.shape[-2] == 0:
        raise ValueError(f"flow_attention takes at least one token, got {shapes}")

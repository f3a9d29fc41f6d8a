"""The recurrent form of causal Flow-Attention: a state of constant size, and one token at a time.

Notation follows Flowformer (arXiv 2202.06258): q is a sink and k a source after their sigmoid, I and O its
incoming and outgoing flow, n the number of tokens seen.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl.attention.precision import accumulation_dtype, without_autocast


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
    shapes = ((), *((head_dim,),) * 4, (), (head_dim, value_dim))
    dtype = accumulation_dtype(query.dtype)
    return FlowState(*(query.new_zeros(batch, heads, *shape, dtype=dtype) for shape in shapes))


def flow_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: FlowState | None = None,
    *,
    clamp: float = 10.0,
    eps: float = 1e-6,
) -> tuple[Tensor, FlowState]:
    """One token in, one out, in constant time and memory.

    ``query`` and ``key`` are (batch, heads, head_dim), before the sigmoid; ``value`` is (batch, heads,
    value_dim); ``state`` is None before the first token. Returns the output (batch, heads, value_dim) and the
    new state. Raises ValueError for shapes that do not fit.
    """
    if query.ndim != 3 or query.shape != key.shape or query.shape[:2] != value.shape[:2] or value.ndim != 3:
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        raise ValueError(f"flow_attention_step takes (batch, heads, head_dim) tensors, got {shapes}")
    expected = (*query.shape, value.shape[-1])
    if state is not None and state.memory.shape != expected:
        raise ValueError(f"state has a memory {tuple(state.memory.shape)}, {expected} would fit the tokens")
    with without_autocast(query):
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
        memory = torch.addcmul(state.memory, k[..., :, None], (competition[..., None] * v)[..., None, :])
        scale = conserved_sink.sigmoid() / incoming
        output = ((scale[..., None] * q)[..., None, :] @ memory)[..., 0, :]
    new_state = FlowState(n, sum_keys, sum_queries, weighted_keys, weighted_queries, sum_exponentials, memory)
    return output.to(value.dtype), new_state

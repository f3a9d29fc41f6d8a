"""A few tokens of causal Flow-Attention at once, from a state that is changed in place: for acting.

The numbers are those of :func:`flowrl.attention.flow.flow_attention_step`, token after token. Tokens lead
in memory, so that every sum over the past is a run of contiguous additions; the memory matrix, by far the
largest part of the state, is read once and written once for all of them.
"""

import torch
from torch import Tensor

from flowrl.attention.flow import FlowState, empty_flow_state
from flowrl.attention.flow.cpu import MOST_STEPS, native_flow_attention_steps, native_supports


def flow_attention_steps(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    state: FlowState | None = None,
    *,
    clamp: float = 10.0,
    eps: float = 1e-6,
) -> tuple[Tensor, FlowState]:
    """Feed a few tokens and return their outputs (batch, heads, tokens, value_dim) and the state after them.

    ``queries`` and ``keys`` are (batch, heads, tokens, head_dim), before the sigmoid, ``values`` are (batch,
    heads, tokens, value_dim); they are cheapest where tokens come first in memory. The tensors of ``state``
    are overwritten and returned; None stands for the state before the first token. There is no gradient.
    """
    with torch.autocast(queries.device.type, enabled=False):
        if state is None:
            state = empty_flow_state(queries[:, :, 0], values[:, :, 0])
        tokens, dtype = queries.shape[2], state.memory.dtype
        inputs = (queries.to(dtype), keys.to(dtype), values.to(dtype))
        if tokens <= MOST_STEPS and native_supports(*inputs) and all(x.is_contiguous() for x in state):
            outputs = native_flow_attention_steps(*inputs, state, clamp=clamp, eps=eps)
            return outputs.to(values.dtype), state
        # All (tokens, batch, heads, width) from here on.
        q, k, v = (x.permute(2, 0, 1, 3) for x in inputs)
        q, k = q.sigmoid(), k.sigmoid()
        qe, ke = q + eps, k + eps
        query_mass, key_mass = eps * qe.sum(-1), eps * ke.sum(-1)
        n = state.num_tokens + torch.arange(1, tokens + 1, dtype=dtype, device=q.device)[:, None, None]
        incoming = (qe * _running_sums(state.sum_keys, k)).sum(-1) + query_mass  # (tokens, batch, heads)
        outgoing = (ke * _running_sums(state.sum_queries, q)).sum(-1) + key_mass
        weighted_keys = _running_sums(state.weighted_keys, k, n / outgoing)
        weighted_queries = _running_sums(state.weighted_queries, q, n / incoming)
        conserved_sink = ((qe * weighted_keys).sum(-1) + query_mass) / n
        conserved_source = ((ke * weighted_queries).sum(-1) + key_mass) / n
        exponential = conserved_source.clamp(-clamp, clamp).exp()
        normaliser = exponential.cumsum(0) + state.sum_exponentials
        competed = (n * exponential / normaliser)[..., None] * v
        aggregated = _aggregate(q, k, competed, state.memory)
        scale = (conserved_sink.sigmoid() / incoming).permute(1, 2, 0)[..., None]
        state.num_tokens.copy_(n[-1])
        state.sum_exponentials.copy_(normaliser[-1])
    return (scale * aggregated).to(values.dtype), state


def _running_sums(total: Tensor, increments: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add (tokens, ...) increments to ``total`` (...) in place; return what it was after each token.

    ``weights``, (tokens, ...) without the last dimension, multiply the increments.
    """
    sums = torch.empty_like(increments)
    before = total
    for token, increment in enumerate(increments):
        if weights is None:
            torch.add(before, increment, out=sums[token])
        else:
            torch.addcmul(before, weights[token][..., None], increment, out=sums[token])
        before = sums[token]
    total.copy_(before)
    return sums


def _aggregate(q: Tensor, k: Tensor, competed: Tensor, memory: Tensor) -> Tensor:
    """Add the tokens to the memory; return (batch, heads, tokens, value_dim), each query against its past."""
    batch, heads = memory.shape[:2]
    q, k, competed = (x.flatten(1, 2).transpose(0, 1) for x in (q, k, competed))  # (N, tokens, width)
    flat = memory.flatten(0, 1)
    result = torch.bmm(q, flat).baddbmm_(torch.bmm(q, k.mT).tril_(), competed)
    flat.baddbmm_(k.mT, competed)
    return result.unflatten(0, (batch, heads))

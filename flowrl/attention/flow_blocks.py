"""The parallel form of causal Flow-Attention over whole blocks, with its gradient written by hand.

A block of C tokens needs only its Gram matrix G = q k^T: the flows I and O are row sums of its lower and
column sums of its upper triangle, the conserved flows the same sums weighted, the output tril(G) (C v).
What came before a block enters as d-vectors and one d x d matrix, found for all blocks at once by
exclusive prefix sums. The backward pass rebuilds G instead of storing it; the five gradients that reach
G are two rank-(value_dim + 2) and rank-2 products, one per triangle.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _CausalFlowBlocks(torch.autograd.Function):
    """Inputs and outputs as :func:`causal_flow_blocks`."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        count: Tensor,
        sum_keys: Tensor,
        sum_queries: Tensor,
        weighted_keys: Tensor,
        weighted_queries: Tensor,
        sum_exponentials: Tensor,
        memory: Tensor,
        blocks: int,
        clamp: float,
        eps: float,
    ) -> tuple[Tensor, ...]:
        q, k, v = (_split(x, blocks) for x in (queries, keys, values))  # (batch, heads, blocks, C, width)
        n = count[..., None] + torch.arange(1, queries.shape[-2] + 1, dtype=q.dtype, device=q.device)
        n = n.unflatten(-1, (blocks, -1))  # (batch, heads, blocks, C)
        gram = q @ k.transpose(-1, -2)
        lower, upper = gram.tril(), gram.triu()  # pairs with source <= sink, and sink <= source
        key_mass, query_mass = k.sum(-1), q.sum(-1)

        past_k, sum_keys = _prefix(k.sum(-2), sum_keys)
        past_q, sum_queries = _prefix(q.sum(-2), sum_queries)
        incoming = lower.sum(-1) + eps * key_mass.cumsum(-1) + _dot(q, past_k + eps, eps)
        outgoing = upper.sum(-2) + eps * query_mass.cumsum(-1) + _dot(k, past_q + eps, eps)

        source_weight, sink_weight = n / outgoing, n / incoming
        past_wk, weighted_keys = _prefix(_row_vector(source_weight, k), weighted_keys)
        past_wq, weighted_queries = _prefix(_row_vector(sink_weight, q), weighted_queries)
        conserved_sink = (
            _matvec(lower, source_weight)
            + eps * (key_mass * source_weight).cumsum(-1)
            + _dot(q, past_wk + eps, eps)
        ) / n
        conserved_source = (
            _row_vector(sink_weight, upper)
            + eps * (query_mass * sink_weight).cumsum(-1)
            + _dot(k, past_wq + eps, eps)
        ) / n

        exponential = conserved_source.clamp(-clamp, clamp).exp()
        past_exp, sum_exponentials = _prefix(exponential.sum(-1), sum_exponentials)
        normaliser = exponential.cumsum(-1) + past_exp[..., None]
        competed = (n * exponential / normaliser)[..., None] * v  # C_j v_j
        past_memory, memory = _prefix(k.transpose(-1, -2) @ competed, memory)
        aggregated = lower @ competed + q @ past_memory
        allocation = conserved_sink.sigmoid()
        output = (allocation / incoming)[..., None] * aggregated

        ctx.save_for_backward(
            q,
            k,
            v,
            n,
            incoming,
            outgoing,
            conserved_source,
            exponential,
            normaliser,
            allocation,
            aggregated,
            past_k,
            past_q,
            past_wk,
            past_wq,
            past_memory,
        )
        ctx.constants = (clamp, eps)
        new_state = (sum_keys, sum_queries, weighted_keys, weighted_queries, sum_exponentials, memory)
        return output.flatten(2, 3), n[..., -1, -1], *new_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, n, incoming, outgoing, conserved_source, exponential, normaliser, *rest = ctx.saved_tensors
        allocation, aggregated, past_k, past_q, past_wk, past_wq, past_memory = rest
        clamp, eps = ctx.constants
        g_output, _, g_sum_k, g_sum_q, g_wk, g_wq, g_sum_exp, g_memory = grads
        g_output = _split(g_output, q.shape[2])
        gram = q @ k.transpose(-1, -2)
        lower, upper = gram.tril(), gram.triu()
        key_mass, query_mass = k.sum(-1), q.sum(-1)
        source_weight, sink_weight = n / outgoing, n / incoming
        competition = n * exponential / normaliser
        competed = competition[..., None] * v

        # result: R = (allocation / I) (tril(G) (C v) + q M)
        scale = allocation / incoming
        g_scale = (g_output * aggregated).sum(-1)
        g_aggregated = scale[..., None] * g_output
        g_sink = g_scale * scale * (1 - allocation) / n  # of n times the conserved sink
        g_incoming = -g_scale * scale / incoming
        later_memory, g_memory_in = _suffix(q.transpose(-1, -2) @ g_aggregated, g_memory)
        g_competed = lower.transpose(-1, -2) @ g_aggregated + k @ later_memory
        g_q = g_aggregated @ past_memory.transpose(-1, -2)
        g_k = competed @ later_memory.transpose(-1, -2)

        # competition: C = n exp(S) / (past sum of exp(S))
        g_v = competition[..., None] * g_competed
        g_competition = (g_competed * v).sum(-1)
        g_normaliser = -g_competition * competition / normaliser
        later_exp, g_sum_exp_in = _suffix(g_normaliser.sum(-1), g_sum_exp)
        g_exponential = g_competition * n / normaliser + _reverse_cumsum(g_normaliser) + later_exp[..., None]
        inside = (conserved_source >= -clamp) & (conserved_source <= clamp)
        g_source = g_exponential * exponential * inside / n  # of n times the conserved source

        # conserved flows: n S_j = triu(G)^T u + ..., n Z_i = tril(G) w + ..., with u = n / I, w = n / O
        later_wq, g_wq_in = _suffix(_row_vector(g_source, k + eps), g_wq)
        later_wk, g_wk_in = _suffix(_row_vector(g_sink, q + eps), g_wk)
        g_source_tail, g_sink_tail = _reverse_cumsum(g_source), _reverse_cumsum(g_sink)
        g_sink_weight = _matvec(upper, g_source) + eps * query_mass * g_source_tail + _dot(q, later_wq)
        g_source_weight = _row_vector(g_sink, lower) + eps * key_mass * g_sink_tail + _dot(k, later_wk)
        g_incoming = g_incoming - g_sink_weight * sink_weight / incoming
        g_outgoing = -g_source_weight * source_weight / outgoing

        # flows: I = row sums of tril(G) + ..., O = column sums of triu(G) + ...
        later_k, g_sum_k_in = _suffix(_row_vector(g_incoming, q + eps), g_sum_k)
        later_q, g_sum_q_in = _suffix(_row_vector(g_outgoing, k + eps), g_sum_q)
        g_query_mass = eps * (sink_weight * g_source_tail + _reverse_cumsum(g_outgoing))
        g_key_mass = eps * (source_weight * g_sink_tail + _reverse_cumsum(g_incoming))

        ones = torch.ones_like(n)
        to_lower = torch.cat((g_aggregated, torch.stack((g_sink, g_incoming), -1)), -1) @ torch.cat(
            (competed, torch.stack((source_weight, ones), -1)), -1
        ).transpose(-1, -2)
        to_upper = torch.stack((sink_weight, ones), -1) @ torch.stack((g_source, g_outgoing), -2)
        g_gram = to_lower.tril_() + to_upper.triu_()
        g_q = (
            g_q
            + g_gram @ k
            + g_query_mass[..., None]
            + _outer(
                (g_sink, past_wk + eps), (g_incoming, past_k + eps), (sink_weight, later_wq), (ones, later_q)
            )
        )
        g_k = (
            g_k
            + g_gram.transpose(-1, -2) @ q
            + g_key_mass[..., None]
            + _outer(
                (g_source, past_wq + eps),
                (g_outgoing, past_q + eps),
                (source_weight, later_wk),
                (ones, later_k),
            )
        )
        g_state = (g_sum_k_in, g_sum_q_in, g_wk_in, g_wq_in, g_sum_exp_in, g_memory_in)
        return g_q.flatten(2, 3), g_k.flatten(2, 3), g_v.flatten(2, 3), None, *g_state, None, None, None


def causal_flow_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, *state_blocks_clamp_eps: Any
) -> tuple[Tensor, ...]:
    """Causal Flow-Attention of (batch, heads, blocks * C, width) tensors **after** the sigmoid.

    Further arguments: the seven tensors of a ``FlowState``, then ``blocks``, ``clamp`` and ``eps``.
    Returns the output (batch, heads, blocks * C, value_dim) and the seven tensors of the state after it.
    """
    return _CausalFlowBlocks.apply(queries, keys, values, *state_blocks_clamp_eps)


def _split(x: Tensor, blocks: int) -> Tensor:  # (batch, heads, blocks * C, width) -> (..., blocks, C, width)
    return x.unflatten(2, (blocks, -1))


def _prefix(per_block: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Per-block sums (batch, heads, blocks, ...) -> what precedes each block, and the total after all."""
    if per_block.shape[2] == 1:
        return state[:, :, None], state + per_block[:, :, 0]
    running = torch.cat((state[:, :, None], per_block), dim=2).cumsum(2)
    return running[:, :, :-1], running[:, :, -1]


def _suffix(per_block: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of :func:`_prefix`: what follows each block, and the total that reaches the state."""
    if per_block.shape[2] == 1:
        return final[:, :, None], final + per_block[:, :, 0]
    running = torch.cat((per_block, final[:, :, None]), dim=2).flip(2).cumsum(2).flip(2)
    return running[:, :, 1:], running[:, :, 0]


def _dot(x: Tensor, vector: Tensor, eps: float = 0.0) -> Tensor:
    """(..., C, d) and (..., d) -> (x + eps) . vector, (..., C)."""
    return (x @ vector[..., None])[..., 0] + eps * vector.sum(-1, keepdim=True)


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:  # (..., C, D) and (..., D) -> (..., C)
    return (matrix @ vector[..., None])[..., 0]


def _row_vector(vector: Tensor, matrix: Tensor) -> Tensor:  # (..., C) and (..., C, D) -> (..., D)
    return (vector[..., None, :] @ matrix)[..., 0, :]


def _outer(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of outer products of (..., C) and (..., d) vectors, as one matrix product (..., C, d)."""
    columns, rows = zip(*pairs, strict=True)
    return torch.stack(columns, dim=-1) @ torch.stack(rows, dim=-2)


def _reverse_cumsum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True) - x.cumsum(-1) + x

"""The parallel form of causal Flow-Attention over blocks of tokens, with its gradient written by hand.

A block of C tokens needs only its Gram matrix G = q k^T: the flows I and O are row sums of its lower and
column sums of its upper triangle, the conserved flows the same sums weighted, the output tril(G) (C v).
What came before a block enters as d-vectors and one d x d matrix, found for all blocks at once by
exclusive prefix sums; their gradients come from later blocks by exclusive suffix sums.

Shapes: N = batch * heads sequences of ``blocks`` blocks; everything inside works on the M = N * blocks
blocks at once, as (M, C) or (M, C, d). A past or later tensor that is None stands for zeros, which is the
whole story of a short window: no state before it, nothing after it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class CausalFlowBlocks(torch.autograd.Function):
    """``apply(queries, keys, values, blocks, goes_on, clamp, eps, *state)`` -> (output, *state after it).

    ``queries`` and ``keys`` are (batch, heads, blocks * C, head_dim) **before** the sigmoid, ``values`` are
    (batch, heads, blocks * C, value_dim). ``state`` is the seven tensors of a ``FlowState``, or seven times
    None before the first token; the state after it is wanted, and not None, where ``goes_on``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        blocks: int,
        goes_on: bool,
        clamp: float,
        eps: float,
        *state: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        num_tokens, sum_k, sum_q, sum_wk, sum_wq, sum_exp, memory = state
        q, k = (_blocks(torch.sigmoid(x.contiguous()), blocks) for x in (queries, keys))  # (M, C, d)
        v = _blocks(values.contiguous(), blocks)
        n = _token_numbers(num_tokens, queries, blocks)  # (M, C), or (1, C) where all blocks share it
        lower, upper = _triangles(q, k)
        key_mass, query_mass = k.sum(-1), q.sum(-1)

        alone = blocks == 1 and num_tokens is None and not goes_on  # nothing before, nothing after
        past_k, sum_k = _prefix(alone, lambda: k.sum(-2), sum_k, blocks)
        past_q, sum_q = _prefix(alone, lambda: q.sum(-2), sum_q, blocks)
        incoming = lower.sum(-1) + eps * key_mass.cumsum(-1) + _flow(q, query_mass, past_k, eps)
        outgoing = upper.sum(-2) + eps * query_mass.cumsum(-1) + _flow(k, key_mass, past_q, eps)

        source_weight, sink_weight = n / outgoing, n / incoming
        past_wk, sum_wk = _prefix(alone, lambda: _row_vector(source_weight, k), sum_wk, blocks)
        past_wq, sum_wq = _prefix(alone, lambda: _row_vector(sink_weight, q), sum_wq, blocks)
        conserved_sink = (
            _matvec(lower, source_weight)
            + eps * (key_mass * source_weight).cumsum(-1)
            + _flow(q, query_mass, past_wk, eps)
        ) / n
        conserved_source = (
            _row_vector(sink_weight, upper)
            + eps * (query_mass * sink_weight).cumsum(-1)
            + _flow(k, key_mass, past_wq, eps)
        ) / n

        exponential = conserved_source.clamp(-clamp, clamp).exp()
        past_exp, sum_exp = _prefix(alone, lambda: exponential.sum(-1), sum_exp, blocks)
        normaliser = exponential.cumsum(-1)
        if past_exp is not None:
            normaliser = normaliser + past_exp[:, None]
        competed = (n * exponential / normaliser)[..., None] * v  # C_j v_j
        past_memory, memory = _prefix(alone, lambda: torch.bmm(k.mT, competed), memory, blocks)
        aggregated = torch.bmm(lower, competed)
        if past_memory is not None:
            aggregated.baddbmm_(q, past_memory)
        allocation = conserved_sink.sigmoid()
        output = (allocation / incoming)[..., None] * aggregated

        kept = (lower, upper, competed) if blocks == 1 else (None, None, None)  # many rebuild theirs
        ctx.save_for_backward(
            q, k, v, n, incoming, outgoing, conserved_source, exponential, normaliser, allocation, aggregated,
            past_k, past_q, past_wk, past_wq, past_memory, *kept,
        )  # fmt: skip
        ctx.constants = (blocks, clamp, eps, queries.shape, values.shape)
        if not goes_on:
            return output.view(values.shape), *(None for _ in state)
        last = n.view(*queries.shape[:2], -1)[..., -1] if len(n) > 1 else n[:, -1:].expand(queries.shape[:2])
        after = (sum_k, sum_q, sum_wk, sum_wq, sum_exp, memory)
        shaped = (None if x is None else x.view(*queries.shape[:2], *x.shape[1:]) for x in after)
        return output.view(values.shape), last, *shaped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, n, incoming, outgoing, conserved_source, exponential, normaliser, *rest = ctx.saved_tensors
        allocation, aggregated, past_k, past_q, past_wk, past_wq, past_memory, lower, upper, competed = rest
        blocks, clamp, eps, queries_shape, values_shape = ctx.constants
        g_output, _, g_sum_k, g_sum_q, g_sum_wk, g_sum_wq, g_sum_exp, g_memory = grads
        if g_output is None:  # only the state was used
            g_output = aggregated.new_zeros(values_shape)
        g_output = _blocks(g_output.contiguous(), blocks)
        if lower is None:
            lower, upper = _triangles(q, k)
        key_mass, query_mass = k.sum(-1), q.sum(-1)
        source_weight, sink_weight = n / outgoing, n / incoming
        competition = n * exponential / normaliser
        if competed is None:
            competed = competition[..., None] * v

        # result: R = (allocation / I) (tril(G) (C v) + q M)
        scale = allocation / incoming
        product = g_output * aggregated
        g_scale = product.sum(-1)
        g_aggregated = torch.mul(g_output, scale[..., None], out=product)  # fresh memory costs more than sums
        g_sink = g_scale * scale * (1 - allocation) / n  # of n times the conserved sink
        g_incoming = -g_scale * scale / incoming
        later_memory, g_memory = _suffix(lambda: torch.bmm(q.mT, g_aggregated), g_memory, past_memory, blocks)
        g_competed = torch.bmm(lower.mT, g_aggregated)
        if later_memory is not None:
            g_competed.baddbmm_(k, later_memory)

        # competition: C = n exp(S) / (past sum of exp(S))
        product = g_competed * v
        g_competition = product.sum(-1)
        g_v = torch.mul(g_competed, competition[..., None], out=product)
        g_normaliser = -g_competition * competition / normaliser
        later_exp, g_sum_exp = _suffix(lambda: g_normaliser.sum(-1), g_sum_exp, past_k, blocks)
        g_exponential = g_competition * n / normaliser + _reverse_cumsum(g_normaliser)
        if later_exp is not None:
            g_exponential = g_exponential + later_exp[:, None]
        inside = (conserved_source >= -clamp) & (conserved_source <= clamp)
        g_source = g_exponential * exponential * inside / n  # of n times the conserved source

        # conserved flows: n S_j = triu(G)^T u + ..., n Z_i = tril(G) w + ..., with u = n / I, w = n / O
        later_wq, g_sum_wq = _suffix(lambda: _row_vector(g_source, k, eps), g_sum_wq, past_wq, blocks)
        later_wk, g_sum_wk = _suffix(lambda: _row_vector(g_sink, q, eps), g_sum_wk, past_wk, blocks)
        source_tail, sink_tail = _reverse_cumsum(g_source), _reverse_cumsum(g_sink)
        g_sink_weight = _matvec(upper, g_source) + eps * query_mass * source_tail
        g_source_weight = _row_vector(g_sink, lower) + eps * key_mass * sink_tail
        if later_wq is not None and later_wk is not None:
            g_sink_weight = g_sink_weight + _matvec(q, later_wq)
            g_source_weight = g_source_weight + _matvec(k, later_wk)
        g_incoming = g_incoming - g_sink_weight * sink_weight / incoming
        g_outgoing = -g_source_weight * source_weight / outgoing

        # flows: I = row sums of tril(G) + ..., O = column sums of triu(G) + ...
        later_k, g_sum_k = _suffix(lambda: _row_vector(g_incoming, q, eps), g_sum_k, past_k, blocks)
        later_q, g_sum_q = _suffix(lambda: _row_vector(g_outgoing, k, eps), g_sum_q, past_q, blocks)
        g_query_mass = sink_weight * source_tail + _reverse_cumsum(g_outgoing) + g_sink + g_incoming
        g_key_mass = source_weight * sink_tail + _reverse_cumsum(g_incoming) + g_source + g_outgoing

        g_lower = torch.bmm(g_aggregated, competed.mT)
        g_lower.addcmul_(g_sink[..., None], source_weight[:, None]).add_(g_incoming[..., None])
        g_upper = (sink_weight[..., None] * g_source[:, None]).add_(g_outgoing[:, None])
        g_gram = g_lower.tril_().add_(g_upper.triu_())
        g_q = torch.bmm(g_gram, k).add_((eps * g_query_mass)[..., None])
        g_k = torch.bmm(g_gram.mT, q).add_((eps * g_key_mass)[..., None])
        if past_memory is not None:
            g_q.baddbmm_(g_aggregated, past_memory.mT)
            _add_outer(g_q, (g_sink, past_wk), (g_incoming, past_k))
            _add_outer(g_k, (g_source, past_wq), (g_outgoing, past_q))
        if later_memory is not None:
            ones = torch.ones_like(incoming)
            g_k.baddbmm_(competed, later_memory.mT)
            _add_outer(g_q, (sink_weight, later_wq), (ones, later_q))
            _add_outer(g_k, (source_weight, later_wk), (ones, later_k))
        sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
        g_queries = sigmoid_backward(g_q, q, grad_input=g_q).view(queries_shape)
        g_keys = sigmoid_backward(g_k, k, grad_input=g_k).view(queries_shape)
        g_state = (g_sum_k, g_sum_q, g_sum_wk, g_sum_wq, g_sum_exp, g_memory)
        needed = zip(g_state, ctx.needs_input_grad[8:], strict=True)
        shaped = (
            g.view(*queries_shape[:2], *g.shape[1:]) if g is not None and need else None for g, need in needed
        )
        return g_queries, g_keys, g_v.view(values_shape), *(None,) * 5, *shaped


def _blocks(x: Tensor, blocks: int) -> Tensor:  # (batch, heads, blocks * C, width) -> (M, C, width)
    return x.view(-1, x.shape[2] // blocks, x.shape[3])


def _token_numbers(num_tokens: Tensor | None, queries: Tensor, blocks: int) -> Tensor:
    length = queries.shape[2]
    n = torch.arange(
        1, length + 1, dtype=torch.promote_types(queries.dtype, torch.float32), device=queries.device
    )
    if num_tokens is None and blocks == 1:
        return n[None]
    start = n.new_zeros(queries.shape[:2]) if num_tokens is None else num_tokens
    return (start[..., None] + n).view(-1, length // blocks)


def _triangles(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrices of blocks where source <= sink, and where sink <= source, each (M, C, C)."""
    gram = torch.bmm(q, k.mT)
    return gram.tril(), gram.triu_()


def _prefix(
    alone: bool, per_block: Callable[[], Tensor], state: Tensor | None, blocks: int
) -> tuple[Tensor | None, Tensor | None]:
    """Per-block sums (M, ...) -> what precedes each block (M, ...), and the total after all (N, ...).

    ``per_block`` is a function, since its value is not needed where a block is ``alone``.
    """
    if alone:
        return None, None
    each = per_block().unflatten(0, (-1, blocks))  # (N, blocks, ...)
    if state is None and blocks == 1:
        return None, each[:, 0]
    start = torch.zeros_like(each[:, :1]) if state is None else state.flatten(0, 1)[:, None]
    running = torch.cat((start, each), dim=1).cumsum(1)
    return running[:, :-1].flatten(0, 1), running[:, -1]


def _suffix(
    per_block: Callable[[], Tensor], final: Tensor | None, past: Tensor | None, blocks: int
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of :func:`_prefix`: what follows each block (M, ...), what reaches the state (N, ...)."""
    if past is None and final is None:
        return None, None
    each = per_block().unflatten(0, (-1, blocks))  # (N, blocks, ...)
    end = torch.zeros_like(each[:, :1]) if final is None else final.flatten(0, 1)[:, None]
    running = torch.cat((each, end), dim=1).flip(1).cumsum(1).flip(1)
    return running[:, 1:].flatten(0, 1), running[:, 0]


def _flow(x: Tensor, mass: Tensor, past: Tensor | None, eps: float) -> Tensor:
    """(x + eps) . (past + eps) over the last dimension, (M, C); ``mass`` is the sum of x over it."""
    own = eps * (mass + eps * x.shape[-1])
    return own if past is None else own + _matvec(x, past) + eps * past.sum(-1, keepdim=True)


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:  # (M, C, D) and (M, D) -> (M, C)
    return torch.bmm(matrix, vector.expand(len(matrix), -1)[..., None])[..., 0]


def _row_vector(vector: Tensor, matrix: Tensor, eps: float = 0.0) -> Tensor:
    """(M, C) and (M, C, D) -> the sum over C of vector times (matrix + eps), (M, D)."""
    product = torch.bmm(vector[:, None], matrix)[:, 0]
    return product if eps == 0 else product + eps * vector.sum(-1, keepdim=True)


def _add_outer(target: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> None:
    """Add the outer products of (M, C) and (M, d) vectors to (M, C, d), as one matrix product."""
    columns = torch.stack([column for column, _ in pairs], dim=-1)
    target.baddbmm_(columns, torch.stack([row for _, row in pairs if row is not None], dim=-2))


def _reverse_cumsum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True) - x.cumsum(-1) + x

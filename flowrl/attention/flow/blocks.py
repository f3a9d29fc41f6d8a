"""Flow-Attention in torch: the causal form over blocks of tokens, and the bidirectional form.

Both are plain torch operations: they run on every device, can be differentiated any number of times, traced
and exported. Notation follows Flowformer (arXiv 2202.06258): q are sinks and k sources after their sigmoid,
I and O the incoming and outgoing flows, n the number of tokens up to and including each.

A block of C tokens needs only its products G = q k^T: the flows I and O are row sums of the lower and column
sums of the upper triangle of G, the conserved flows the same sums weighted, the output tril(G) (C v). What
precedes a block enters as four vectors, one number and one head_dim x value_dim matrix, found for all blocks
at once by prefix sums.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl.attention.flow.recurrent import FlowState

ONE_BLOCK = 128  # tokens up to which one block does the whole job
SHORTEST_BLOCK = 32  # otherwise a block has head_dim tokens: the pairs then cost as much as the memory


def causal_flow_blocks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    clamp: float,
    eps: float,
    mask: Tensor | None = None,
    state: FlowState | None = None,
    return_state: bool = False,
    one_block: bool = False,
) -> tuple[Tensor, FlowState | None]:
    """The causal form, linear in length in time and memory.

    Args:
        queries, keys: (batch, heads, length, head_dim) before the sigmoid, float32 or float64.
        values: (batch, heads, length, value_dim).
        mask: (batch, length) bool, True for valid tokens; the others count for nothing and give zeros.
        state: the past, None for no past.
        return_state: whether the state after the last token is wanted.
        one_block: one block of any length, without a decision that depends on it: for tracing. Time and
            memory are then quadratic in length.

    Returns the outputs (batch, heads, length, value_dim) and the state after them, None unless wanted.
    """
    batch, heads, length, head_dim = queries.shape
    block, blocks, padding = length, 1, 0
    if not one_block and length > ONE_BLOCK:
        block = max(head_dim, SHORTEST_BLOCK)
        blocks = -(-length // block)
        if torch.compiler.is_compiling():
            blocks = length // block + 1  # inductor takes minutes over the index arithmetic of the other
        padding = blocks * block - length

    def cut(x: Tensor, fill: float) -> Tensor:
        """(batch, heads, length, width) -> (batch, heads, blocks, C, width), with ``fill`` where invalid."""
        if mask is not None:
            x = x.masked_fill(~mask[:, None, :, None], fill)
        x = F.pad(x, (0, 0, 0, padding), value=fill) if padding else x.contiguous()
        return x.view(batch, heads, blocks, block, x.shape[-1])

    q, k, v = cut(queries, -torch.inf).sigmoid(), cut(keys, -torch.inf).sigmoid(), cut(values, 0.0)
    counts = torch.arange(1, length + 1, device=q.device)[None] if mask is None else mask.cumsum(-1)
    n = F.pad(counts.to(q.dtype), (0, padding), value=1.0).view(-1, 1, blocks, block)  # broadcasts
    if state is not None:
        n = n + state.num_tokens[..., None, None]
    invalid = None
    if mask is not None or padding:
        valid = counts > 0 if mask is None else mask
        invalid = ~F.pad(valid, (0, padding)).view(-1, 1, blocks, block)
        n = n.clamp(min=1)  # 0 before the first valid token
    pairs = q @ k.transpose(-1, -2)
    lower, upper = pairs.tril(), pairs.triu()  # source <= sink, sink <= source; (batch, heads, blocks, C, C)
    key_mass, query_mass = k.sum(-1), q.sum(-1)

    alone = blocks == 1 and state is None and not return_state  # nothing before the block, nothing after it
    before = (None,) * 6 if state is None else state[1:]

    def prefix(per_block: Callable[[], Tensor], start: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Sums (batch, heads, blocks, ...) of each block -> of all before each block, and of all."""
        if alone:
            return None, None
        each = per_block()
        if blocks == 1 and start is not None:
            return start[:, :, None], start + each[:, :, 0]
        first = torch.zeros_like(each[:, :, :1]) if start is None else start[:, :, None]
        running = torch.cat((first, each), dim=2).cumsum(2)
        return running[:, :, :-1], running[:, :, -1]

    def flow(x: Tensor, mass: Tensor, past: Tensor | None) -> Tensor:
        """(x + eps) . (past + eps) over the last dimension; ``mass`` is the sum of x over it."""
        own = eps * (mass + eps * head_dim)
        return own if past is None else own + _matvec(x, past) + eps * past.sum(-1, keepdim=True)

    past, sum_keys = prefix(lambda: k.sum(-2), before[0])
    incoming = lower.sum(-1) + eps * key_mass.cumsum(-1) + flow(q, query_mass, past)
    past, sum_queries = prefix(lambda: q.sum(-2), before[1])
    outgoing = upper.sum(-2) + eps * query_mass.cumsum(-1) + flow(k, key_mass, past)

    if invalid is not None:  # flows there are 0 without eps
        incoming, outgoing = incoming.masked_fill(invalid, 1.0), outgoing.masked_fill(invalid, 1.0)
    source_weight, sink_weight = n / outgoing, n / incoming
    past, weighted_keys = prefix(lambda: _matvec(k.transpose(-1, -2), source_weight), before[2])
    conserved_sink = _matvec(lower, source_weight) + eps * (key_mass * source_weight).cumsum(-1)
    conserved_sink = (conserved_sink + flow(q, query_mass, past)) / n
    past, weighted_queries = prefix(lambda: _matvec(q.transpose(-1, -2), sink_weight), before[3])
    conserved_source = _matvec(upper.transpose(-1, -2), sink_weight) + eps * (
        query_mass * sink_weight
    ).cumsum(-1)
    conserved_source = (conserved_source + flow(k, key_mass, past)) / n

    exponential = conserved_source.clamp(-clamp, clamp).exp()
    if invalid is not None:
        exponential = exponential.masked_fill(invalid, 0.0)
    past, sum_exponentials = prefix(lambda: exponential.sum(-1), before[4])
    normaliser = exponential.cumsum(-1)
    if past is not None:
        normaliser = normaliser + past[..., None]
    if invalid is not None:
        normaliser = normaliser.masked_fill(invalid, 1.0)  # otherwise 0 before the first valid token
    competed = (n * exponential / normaliser)[..., None] * v  # C_j v_j
    past, memory = prefix(lambda: k.transpose(-1, -2) @ competed, before[5])
    aggregated = lower @ competed
    if past is not None:
        aggregated = aggregated + q @ past
    outputs = (conserved_sink.sigmoid() / incoming)[..., None] * aggregated
    outputs = outputs.view(batch, heads, blocks * block, values.shape[-1])[:, :, :length]
    if not return_state:
        return outputs, None
    num_tokens = counts[:, -1:].to(q.dtype).expand(batch, heads)
    if state is not None:
        num_tokens = num_tokens + state.num_tokens
    sums = (sum_keys, sum_queries, weighted_keys, weighted_queries, sum_exponentials, memory)
    return outputs, FlowState(num_tokens, *(x for x in sums if x is not None))


def bidirectional_flow(
    queries: Tensor, keys: Tensor, values: Tensor, *, clamp: float, eps: float, mask: Tensor | None = None
) -> Tensor:
    """The paper's Eq. 4-9: every sink receives from every source, whose number may be another.

    Takes and returns what :func:`causal_flow_blocks` does; with a ``mask`` the two numbers are the same.
    """
    num_sinks: int | Tensor = queries.shape[-2]
    num_sources: int | Tensor = keys.shape[-2]
    if mask is not None:
        valid = mask[:, None, :, None]
        queries, keys = (x.masked_fill(~valid, -torch.inf) for x in (queries, keys))
        values = values.masked_fill(~valid, 0.0)
        num_sinks = num_sources = valid.sum(-2, keepdim=True).clamp(min=1)
    q, k = queries.sigmoid(), keys.sigmoid()
    qe, ke = q + eps, k + eps
    incoming = qe @ (k.sum(-2) + eps)[..., None]  # (batch, heads, sinks, 1), Eq. 4
    outgoing = ke @ (q.sum(-2) + eps)[..., None]  # (batch, heads, sources, 1)
    if mask is not None:  # flows there are 0 without eps
        incoming, outgoing = (flow.masked_fill(~valid, 1.0) for flow in (incoming, outgoing))
    conserved_sink = qe @ ((k / outgoing).sum(-2) + eps)[..., None]  # Eq. 7
    conserved_source = (ke @ ((q / incoming).sum(-2) + eps)[..., None]).clamp(-clamp, clamp)
    if mask is not None:
        conserved_source = conserved_source.masked_fill(~valid, torch.finfo(q.dtype).min)
    competition = num_sources * conserved_source.softmax(dim=-2)  # Eq. 8
    memory = k.transpose(-1, -2) @ (competition * values)  # (batch, heads, head_dim, value_dim)
    return (conserved_sink * (num_sinks / num_sources)).sigmoid() / incoming * (q @ memory)  # Eq. 9


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:  # (..., C, D) and (..., D) -> (..., C)
    return (matrix @ vector[..., None])[..., 0]

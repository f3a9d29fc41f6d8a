"""Triton kernels of causal Flow-Attention, backward; see :mod:`flowrl.attention.flow.triton_forward`.

Five passes again, with suffix sums between them: a scanned buffer's slots count blocks from the last one, so
block b adds at ``blocks - b`` and finds what later blocks added at ``blocks - 1 - b``. ``grads`` is
(5, sequences, length): the gradient times the output, and the gradients by C, by n times the conserved
source, by I and by O. What a pass needs of the conserved sink's gradient follows from the first.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators
# Arguments of kernels are pointers and numbers of the device: triton reads no annotation but constexpr.

import triton
import triton.language as tl

from flowrl.attention.flow.triton_forward import (
    INCOMING,
    NORMALISER,
    OUTGOING,
    SINK,
    SOURCE,
    corner,
    exponential,
    lower,
    matrix,
    opened,
    past_pairs,
    past_pairs_of_sources,
    per_token,
    place,
    store_matrix,
    store_per_token,
    store_tile,
    store_vector,
    tile,
    upper,
    vector,
    weighted_sum,
    window_flows,
)

# Rows of ``grads``.
PRODUCT: tl.constexpr = tl.constexpr(0)  # of the output and its gradient
G_COMPETITION: tl.constexpr = tl.constexpr(1)
G_SOURCE: tl.constexpr = tl.constexpr(2)
G_INCOMING: tl.constexpr = tl.constexpr(3)
G_OUTGOING: tl.constexpr = tl.constexpr(4)


@triton.jit
def later_sum(x, TOKENS: tl.constexpr):
    """The sum of x over this token and those after it in the block, (TOKENS,)."""
    return tl.sum(upper(tl.zeros((TOKENS, TOKENS), tl.float32) + x[None, :], TOKENS), 1)


@triton.jit
def gradient_of_source(g_competition, g_normalisers, source, normaliser, n, clamp):
    """The gradient by n times the conserved source, through its exponential and the clamp."""
    inside = (source >= -clamp) & (source <= clamp)
    g_exponential = g_competition * n / normaliser + g_normalisers
    return tl.where(inside, g_exponential * exponential(source, clamp) / n, 0.0)


@triton.jit
def block_gradients(
    q, k, g_aggregated, competed, g_sink, g_source, g_incoming, g_outgoing, sink_weight, source_weight, eps,
    TOKENS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Gradients by q and k through the block's own pairs of tokens, (TOKENS, WIDTH) each."""
    sink_side = lower(g_sink[:, None] * source_weight[None, :] + g_incoming[:, None], TOKENS)
    source_side = upper(sink_weight[:, None] * g_source[None, :] + g_outgoing[None, :], TOKENS)
    g_gram = lower(tl.dot(g_aggregated, tl.trans(competed), input_precision=VALUES), TOKENS)
    g_gram += sink_side + source_side
    g_q = tl.dot(g_gram, k, input_precision=VALUES)
    g_q += eps * (tl.sum(source_side, 1) + g_sink + g_incoming)[:, None]
    g_k = tl.dot(tl.trans(g_gram), q, input_precision=VALUES)
    g_k += eps * (tl.sum(sink_side, 0) + g_source + g_outgoing)[:, None]
    return g_q, g_k


@triton.jit
def grad_memory_kernel(
    queries, outputs, g_outputs, g_memory, g_weighted, flows, grads, heads, sequences, length, blocks,
    in_batch, in_head, in_token, out_batch, out_head, out_token, eps,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pass 1: what later blocks need of this one's outputs: gradients by the memory and by sum of (n/O) k."""
    sequence, block, start = place(blocks, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = start + rows < length, (start + rows + 1).to(tl.float32)
    q = opened(
        queries + corner(sequence, start, heads, in_batch, in_head, in_token), rows, in_token, valid, WIDTH
    )
    offset = corner(sequence, start, heads, out_batch, out_head, out_token)
    output = tile(outputs + offset, rows, out_token, valid, WIDTH)
    g_output = tile(g_outputs + offset, rows, out_token, valid, WIDTH)
    incoming = per_token(flows, INCOMING, sequence, sequences, start, length, rows, valid)
    allocation = tl.sigmoid(per_token(flows, SINK, sequence, sequences, start, length, rows, valid))
    product = tl.sum(output * g_output, 1)
    store_per_token(grads, PRODUCT, sequence, sequences, start, length, rows, valid, product)
    g_sink = product * (1 - allocation) / n
    g_aggregated = (allocation / incoming)[:, None] * g_output
    slot = blocks - block
    store_matrix(
        g_memory, sequence, slot, blocks, tl.dot(tl.trans(q), g_aggregated, input_precision=VALUES), WIDTH
    )
    store_vector(g_weighted, sequence, slot, blocks, weighted_sum(g_sink, q + eps), WIDTH)


@triton.jit
def grad_values_kernel(
    queries, keys, values, g_outputs, g_values, g_memory, g_exponentials, flows, grads,
    heads, sequences, length, blocks, in_batch, in_head, in_token, out_batch, out_head, out_token, clamp,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pass 2: the gradients by the values and by the competition."""
    sequence, block, start = place(blocks, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = start + rows < length, (start + rows + 1).to(tl.float32)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    v = tile(values + offset, rows, in_token, valid, WIDTH)
    offset = corner(sequence, start, heads, out_batch, out_head, out_token)
    g_output = tile(g_outputs + offset, rows, out_token, valid, WIDTH)
    incoming = per_token(flows, INCOMING, sequence, sequences, start, length, rows, valid)
    sink = per_token(flows, SINK, sequence, sequences, start, length, rows, valid)
    source = per_token(flows, SOURCE, sequence, sequences, start, length, rows, valid)
    normaliser = per_token(flows, NORMALISER, sequence, sequences, start, length, rows, valid)
    g_aggregated = (tl.sigmoid(sink) / incoming)[:, None] * g_output
    competition = n * exponential(source, clamp) / normaliser
    weights = lower(tl.dot(q, tl.trans(k), input_precision=VALUES), TOKENS)
    later_memory = matrix(g_memory, sequence, blocks - 1 - block, blocks, WIDTH)
    g_competed = tl.dot(k, later_memory, input_precision=VALUES)
    g_competed += tl.dot(tl.trans(weights), g_aggregated, input_precision=VALUES)
    store_tile(g_values + offset, rows, out_token, valid, competition[:, None] * g_competed, WIDTH)
    g_competition = tl.sum(g_competed * v, 1)
    store_per_token(grads, G_COMPETITION, sequence, sequences, start, length, rows, valid, g_competition)
    g_normaliser = tl.sum(-g_competition * competition / normaliser, 0)
    tl.store(g_exponentials + sequence * (blocks + 1) + blocks - block, g_normaliser)


@triton.jit
def grad_source_kernel(
    keys, g_exponentials, g_weighted, flows, grads, heads, sequences, length, blocks,
    in_batch, in_head, in_token, eps, clamp, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 3: the gradient by the conserved source, and from it by the sum of (n/I) q."""
    sequence, block, start = place(blocks, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = start + rows < length, (start + rows + 1).to(tl.float32)
    k = opened(
        keys + corner(sequence, start, heads, in_batch, in_head, in_token), rows, in_token, valid, WIDTH
    )
    source = per_token(flows, SOURCE, sequence, sequences, start, length, rows, valid)
    normaliser = per_token(flows, NORMALISER, sequence, sequences, start, length, rows, valid)
    g_competition = per_token(grads, G_COMPETITION, sequence, sequences, start, length, rows, valid)
    g_competition = tl.where(valid, g_competition, 0.0)
    g_normaliser = -g_competition * n * exponential(source, clamp) / (normaliser * normaliser)
    later = tl.load(g_exponentials + sequence * (blocks + 1) + blocks - 1 - block)
    g_normalisers = later_sum(g_normaliser, TOKENS) + later
    g_source = gradient_of_source(g_competition, g_normalisers, source, normaliser, n, clamp)
    g_source = tl.where(valid, g_source, 0.0)
    store_per_token(grads, G_SOURCE, sequence, sequences, start, length, rows, valid, g_source)
    sequences_before = sequences + sequence  # the second half of the buffer
    store_vector(g_weighted, sequences_before, blocks - block, blocks, weighted_sum(g_source, k + eps), WIDTH)


@triton.jit
def grad_flows_kernel(
    queries, keys, g_weighted, g_sums, flows, grads, heads, sequences, length, blocks,
    in_batch, in_head, in_token, eps, TOKENS: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Pass 4: the gradients by I and O, and from them by the sums of k and q."""
    sequence, block, start = place(blocks, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = start + rows < length, (start + rows + 1).to(tl.float32)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    incoming = per_token(flows, INCOMING, sequence, sequences, start, length, rows, valid)
    outgoing = per_token(flows, OUTGOING, sequence, sequences, start, length, rows, valid)
    allocation = tl.sigmoid(per_token(flows, SINK, sequence, sequences, start, length, rows, valid))
    product = tl.where(valid, per_token(grads, PRODUCT, sequence, sequences, start, length, rows, valid), 0.0)
    g_source = tl.where(
        valid, per_token(grads, G_SOURCE, sequence, sequences, start, length, rows, valid), 0.0
    )
    g_sink = product * (1 - allocation) / n
    slot = blocks - 1 - block
    later_keys = vector(g_weighted, sequence, slot, blocks, WIDTH)
    later_queries = vector(g_weighted, sequences + sequence, slot, blocks, WIDTH)
    gram = tl.dot(q, tl.trans(k), input_precision=SUMS)
    g_sink_weight = tl.sum(past_pairs_of_sources(gram, q, eps, TOKENS) * g_source[None, :], 1)
    g_source_weight = tl.sum(past_pairs(gram, k, eps, TOKENS) * g_sink[:, None], 0)
    g_sink_weight += tl.sum(q * later_queries[None, :], 1)
    g_source_weight += tl.sum(k * later_keys[None, :], 1)
    g_incoming = -(product + g_sink_weight * (n / incoming)) / incoming
    g_outgoing = -g_source_weight * (n / outgoing) / outgoing
    g_incoming, g_outgoing = tl.where(valid, g_incoming, 0.0), tl.where(valid, g_outgoing, 0.0)
    store_per_token(grads, G_INCOMING, sequence, sequences, start, length, rows, valid, g_incoming)
    store_per_token(grads, G_OUTGOING, sequence, sequences, start, length, rows, valid, g_outgoing)
    slot = blocks - block
    store_vector(g_sums, sequence, slot, blocks, weighted_sum(g_incoming, q + eps), WIDTH)
    store_vector(g_sums, sequences + sequence, slot, blocks, weighted_sum(g_outgoing, k + eps), WIDTH)


@triton.jit
def grad_inputs_kernel(
    queries, keys, values, g_outputs, g_queries, g_keys, sums, weighted, memory, g_sums, g_weighted, g_memory,
    flows, grads, heads, sequences, length, blocks, in_batch, in_head, in_token,
    out_batch, out_head, out_token, eps, clamp,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pass 5: the gradients by queries and keys, of the block's own pairs, the past and the future."""
    sequence, block, start = place(blocks, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = start + rows < length, (start + rows + 1).to(tl.float32)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    v = tile(values + offset, rows, in_token, valid, WIDTH)
    offset = corner(sequence, start, heads, out_batch, out_head, out_token)
    g_output = tile(g_outputs + offset, rows, out_token, valid, WIDTH)
    incoming = per_token(flows, INCOMING, sequence, sequences, start, length, rows, valid)
    outgoing = per_token(flows, OUTGOING, sequence, sequences, start, length, rows, valid)
    allocation = tl.sigmoid(per_token(flows, SINK, sequence, sequences, start, length, rows, valid))
    source = per_token(flows, SOURCE, sequence, sequences, start, length, rows, valid)
    normaliser = per_token(flows, NORMALISER, sequence, sequences, start, length, rows, valid)
    product = tl.where(valid, per_token(grads, PRODUCT, sequence, sequences, start, length, rows, valid), 0.0)
    g_source = tl.where(
        valid, per_token(grads, G_SOURCE, sequence, sequences, start, length, rows, valid), 0.0
    )
    g_incoming = per_token(grads, G_INCOMING, sequence, sequences, start, length, rows, valid)
    g_outgoing = per_token(grads, G_OUTGOING, sequence, sequences, start, length, rows, valid)
    g_incoming, g_outgoing = tl.where(valid, g_incoming, 0.0), tl.where(valid, g_outgoing, 0.0)
    sink_weight, source_weight = n / incoming, n / outgoing
    g_sink = product * (1 - allocation) / n
    g_aggregated = (allocation / incoming)[:, None] * g_output
    competed = (n * exponential(source, clamp) / normaliser)[:, None] * v
    g_q, g_k = block_gradients(
        q, k, g_aggregated, competed, g_sink, g_source, g_incoming, g_outgoing, sink_weight, source_weight,
        eps, TOKENS, VALUES,
    )  # fmt: skip
    second, slot = sequences + sequence, blocks - 1 - block
    past_memory = matrix(memory, sequence, block, blocks, WIDTH)
    g_q += tl.dot(g_aggregated, tl.trans(past_memory), input_precision=VALUES)
    g_q += g_incoming[:, None] * vector(sums, sequence, block, blocks, WIDTH)[None, :]
    g_q += g_sink[:, None] * vector(weighted, sequence, block, blocks, WIDTH)[None, :]
    g_q += sink_weight[:, None] * vector(g_weighted, second, slot, blocks, WIDTH)[None, :]
    g_q += vector(g_sums, second, slot, blocks, WIDTH)[None, :]
    store_tile(g_queries + offset, rows, out_token, valid, g_q * q * (1 - q), WIDTH)
    later_memory = matrix(g_memory, sequence, slot, blocks, WIDTH)
    g_k += tl.dot(competed, tl.trans(later_memory), input_precision=VALUES)
    g_k += g_outgoing[:, None] * vector(sums, second, block, blocks, WIDTH)[None, :]
    g_k += g_source[:, None] * vector(weighted, second, block, blocks, WIDTH)[None, :]
    g_k += source_weight[:, None] * vector(g_weighted, sequence, slot, blocks, WIDTH)[None, :]
    g_k += vector(g_sums, sequence, slot, blocks, WIDTH)[None, :]
    store_tile(g_keys + offset, rows, out_token, valid, g_k * k * (1 - k), WIDTH)


@triton.jit
def grad_window_kernel(
    queries, keys, values, g_outputs, g_queries, g_keys, g_values, heads, length,
    in_batch, in_head, in_token, out_batch, out_head, out_token, eps, clamp,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The whole backward of a sequence of at most TOKENS tokens; its flows and outputs are found again."""
    sequence, _, start = place(1, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = rows < length, (rows + 1).to(tl.float32)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    v = tile(values + offset, rows, in_token, valid, WIDTH)
    offset = corner(sequence, start, heads, out_batch, out_head, out_token)
    g_output = tile(g_outputs + offset, rows, out_token, valid, WIDTH)
    gram = tl.dot(q, tl.trans(k), input_precision=SUMS)
    incoming, outgoing, sink, source, normaliser = window_flows(gram, q, k, n, eps, clamp, TOKENS, WIDTH)
    allocation = tl.sigmoid(sink)
    competition = n * exponential(source, clamp) / normaliser
    competed = competition[:, None] * v
    sink_weight, source_weight = n / incoming, n / outgoing
    g_aggregated = (allocation / incoming)[:, None] * g_output
    weights = lower(gram, TOKENS)
    product = tl.sum(tl.dot(weights, competed, input_precision=VALUES) * g_aggregated, 1)
    g_sink = product * (1 - allocation) / n

    g_competed = tl.dot(tl.trans(weights), g_aggregated, input_precision=VALUES)
    store_tile(g_values + offset, rows, out_token, valid, competition[:, None] * g_competed, WIDTH)
    g_competition = tl.sum(g_competed * v, 1)
    g_normalisers = later_sum(-g_competition * competition / normaliser, TOKENS)
    g_source = gradient_of_source(g_competition, g_normalisers, source, normaliser, n, clamp)
    g_sink_weight = tl.sum(past_pairs_of_sources(gram, q, eps, TOKENS) * g_source[None, :], 1)
    g_source_weight = tl.sum(past_pairs(gram, k, eps, TOKENS) * g_sink[:, None], 0)
    g_incoming = -(product + g_sink_weight * sink_weight) / incoming
    g_outgoing = -g_source_weight * source_weight / outgoing
    g_q, g_k = block_gradients(
        q, k, g_aggregated, competed, g_sink, g_source, g_incoming, g_outgoing,
        sink_weight, source_weight, eps, TOKENS, VALUES,
    )  # fmt: skip
    store_tile(g_queries + offset, rows, out_token, valid, g_q * q * (1 - q), WIDTH)
    store_tile(g_keys + offset, rows, out_token, valid, g_k * k * (1 - k), WIDTH)

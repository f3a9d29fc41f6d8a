"""Triton kernels of causal Flow-Attention, forward: one program per block of TOKENS tokens.

A sequence of one block is done by ``window_kernel`` alone. Longer ones take five passes; between them torch
turns the blocks' sums into prefix sums. The formulas are those of :mod:`flowrl.attention.flow.blocks`. This
module imports triton and is itself imported only by :mod:`flowrl.attention.flow.triton`.

Everything is float32 once loaded. SUMS is how the products behind flows and normalisers are made (three
TensorFloat-32 products, as exact as float32), VALUES how those behind outputs and gradients are.

Layouts: ``queries``, ``keys``, ``values`` share the strides ``in_batch, in_head, in_token``, results have
``out_*``; ``flows`` is (5, sequences, length): I, O, conserved sink, conserved source, normaliser. A scanned
buffer is (sequences, blocks + 1, ...): block b adds its sum at b + 1 and finds its prefix at b.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators
# Arguments of kernels are pointers and numbers of the device: triton reads no annotation but constexpr.

import triton
import triton.language as tl

# Rows of ``flows``.
INCOMING: tl.constexpr = tl.constexpr(0)
OUTGOING: tl.constexpr = tl.constexpr(1)
SINK: tl.constexpr = tl.constexpr(2)
SOURCE: tl.constexpr = tl.constexpr(3)
NORMALISER: tl.constexpr = tl.constexpr(4)


@triton.jit
def place(blocks, TOKENS: tl.constexpr):
    """This program's sequence (int64), block, and the block's first token."""
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), program % blocks, (program % blocks) * TOKENS


@triton.jit
def corner(sequence, start, heads, batch_stride, head_stride, token_stride):
    """Offset of a block's first element in a (batch, heads, length, width) tensor."""
    return (
        sequence // heads * batch_stride + sequence % heads * head_stride + start.to(tl.int64) * token_stride
    )


@triton.jit
def tile(pointer, rows, token_stride, valid, WIDTH: tl.constexpr):
    """A block's rows (TOKENS, WIDTH) as float32, zeros past the end of the sequence."""
    columns = tl.arange(0, WIDTH)
    address = pointer + rows[:, None] * token_stride + columns[None, :]
    return tl.load(address, mask=valid[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, rows, token_stride, valid, x, WIDTH: tl.constexpr):
    address = pointer + rows[:, None] * token_stride + tl.arange(0, WIDTH)[None, :]
    tl.store(address, x.to(pointer.dtype.element_ty), mask=valid[:, None])


@triton.jit
def opened(pointer, rows, token_stride, valid, WIDTH: tl.constexpr):
    """The sigmoid of a block's queries or keys, zeros past the end."""
    return tl.where(valid[:, None], tl.sigmoid(tile(pointer, rows, token_stride, valid, WIDTH)), 0.0)


@triton.jit
def per_token(pointer, row, sequence, sequences, start, length, rows, valid):
    """One row of a (rows, sequences, length) tensor for a block; ones past the end, they may divide."""
    address = pointer + (row * sequences + sequence) * length + start + rows
    return tl.load(address, mask=valid, other=1.0)


@triton.jit
def store_per_token(pointer, row, sequence, sequences, start, length, rows, valid, x):
    tl.store(pointer + (row * sequences + sequence) * length + start + rows, x, mask=valid)


@triton.jit
def vector(pointer, sequence, slot, blocks, WIDTH: tl.constexpr):
    """Entry ``slot`` (WIDTH,) of a scanned buffer of vectors."""
    return tl.load(pointer + (sequence * (blocks + 1) + slot) * WIDTH + tl.arange(0, WIDTH))


@triton.jit
def store_vector(pointer, sequence, slot, blocks, x, WIDTH: tl.constexpr):
    tl.store(pointer + (sequence * (blocks + 1) + slot) * WIDTH + tl.arange(0, WIDTH), x)


@triton.jit
def matrix(pointer, sequence, slot, blocks, WIDTH: tl.constexpr):
    """Entry ``slot`` (WIDTH, WIDTH) of a scanned buffer of matrices."""
    places = tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + (sequence * (blocks + 1) + slot) * WIDTH * WIDTH + places)


@triton.jit
def store_matrix(pointer, sequence, slot, blocks, x, WIDTH: tl.constexpr):
    places = tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(pointer + (sequence * (blocks + 1) + slot) * WIDTH * WIDTH + places, x)


@triton.jit
def lower(x, TOKENS: tl.constexpr):
    """x where source (column) <= sink (row), else 0."""
    tokens = tl.arange(0, TOKENS)
    return tl.where(tokens[:, None] >= tokens[None, :], x, 0.0)


@triton.jit
def upper(x, TOKENS: tl.constexpr):
    """x where sink (row) <= source (column), else 0."""
    tokens = tl.arange(0, TOKENS)
    return tl.where(tokens[:, None] <= tokens[None, :], x, 0.0)


@triton.jit
def past_pairs(gram, k, eps, TOKENS: tl.constexpr):
    """(q_i + eps) . k_j where j <= i: row sums are the block's own part of the incoming flow."""
    return lower(gram + eps * tl.sum(k, 1)[None, :], TOKENS)


@triton.jit
def past_pairs_of_sources(gram, q, eps, TOKENS: tl.constexpr):
    """q_i . (k_j + eps) where i <= j: column sums are the block's own part of the outgoing flow."""
    return upper(gram + eps * tl.sum(q, 1)[:, None], TOKENS)


@triton.jit
def eps_flow(x, eps, WIDTH: tl.constexpr):
    """(x + eps) . eps, what remains of a flow without any past."""
    return eps * (tl.sum(x, 1) + eps * WIDTH)


@triton.jit
def flow_from(x, vector, eps):
    """(x + eps) . vector for each row, (TOKENS,)."""
    return tl.sum(x * vector[None, :], 1) + eps * tl.sum(vector, 0)


@triton.jit
def weighted_sum(weight, x):
    """The sum of weight_i x_i over rows, (WIDTH,)."""
    return tl.sum(weight[:, None] * x, 0)


@triton.jit
def exponential(source, clamp):
    return tl.exp(tl.minimum(tl.maximum(source, -clamp), clamp))


@triton.jit
def sums_kernel(
    queries, keys, sums, heads, sequences, length, blocks, in_batch, in_head, in_token,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 1: the blocks' sums of k and q into the scanned ``sums`` (2, sequences, blocks + 1, WIDTH)."""
    sequence, block, start = place(blocks, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid = start + rows < length
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    store_vector(sums, sequence, block + 1, blocks, tl.sum(k, 0), WIDTH)
    store_vector(sums, sequences + sequence, block + 1, blocks, tl.sum(q, 0), WIDTH)


@triton.jit
def flows_kernel(
    queries, keys, sums, weighted, flows, heads, sequences, length, blocks, in_batch, in_head, in_token, eps,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Pass 2: I and O, and the blocks' sums of (n / O) k and (n / I) q into the scanned ``weighted``."""
    sequence, block, start = place(blocks, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = start + rows < length, (start + rows + 1).to(tl.float32)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    gram = tl.dot(q, tl.trans(k), input_precision=SUMS)
    incoming = tl.sum(past_pairs(gram, k, eps, TOKENS), 1) + eps_flow(q, eps, WIDTH)
    outgoing = tl.sum(past_pairs_of_sources(gram, q, eps, TOKENS), 0) + eps_flow(k, eps, WIDTH)
    incoming += flow_from(q, vector(sums, sequence, block, blocks, WIDTH), eps)
    outgoing += flow_from(k, vector(sums, sequences + sequence, block, blocks, WIDTH), eps)
    store_per_token(flows, INCOMING, sequence, sequences, start, length, rows, valid, incoming)
    store_per_token(flows, OUTGOING, sequence, sequences, start, length, rows, valid, outgoing)
    store_vector(weighted, sequence, block + 1, blocks, weighted_sum(n / outgoing, k), WIDTH)
    store_vector(weighted, sequences + sequence, block + 1, blocks, weighted_sum(n / incoming, q), WIDTH)


@triton.jit
def conserved_kernel(
    queries, keys, weighted, exponentials, flows, heads, sequences, length, blocks,
    in_batch, in_head, in_token, eps, clamp, TOKENS: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Pass 3: the conserved flows, and the blocks' sums of exp(source) into ``exponentials``."""
    sequence, block, start = place(blocks, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = start + rows < length, (start + rows + 1).to(tl.float32)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    incoming = per_token(flows, INCOMING, sequence, sequences, start, length, rows, valid)
    outgoing = per_token(flows, OUTGOING, sequence, sequences, start, length, rows, valid)
    gram = tl.dot(q, tl.trans(k), input_precision=SUMS)
    sink = tl.sum(past_pairs(gram, k, eps, TOKENS) * (n / outgoing)[None, :], 1) + eps_flow(q, eps, WIDTH)
    source = tl.sum(past_pairs_of_sources(gram, q, eps, TOKENS) * (n / incoming)[:, None], 0)
    source += eps_flow(k, eps, WIDTH)
    sink = (sink + flow_from(q, vector(weighted, sequence, block, blocks, WIDTH), eps)) / n
    source = (source + flow_from(k, vector(weighted, sequences + sequence, block, blocks, WIDTH), eps)) / n
    store_per_token(flows, SINK, sequence, sequences, start, length, rows, valid, sink)
    store_per_token(flows, SOURCE, sequence, sequences, start, length, rows, valid, source)
    total = tl.sum(tl.where(valid, exponential(source, clamp), 0.0), 0)
    tl.store(exponentials + sequence * (blocks + 1) + block + 1, total)


@triton.jit
def memory_kernel(
    keys, values, exponentials, memory, flows, heads, sequences, length, blocks, in_batch, in_head, in_token,
    clamp, TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pass 4: the normalisers, and the blocks' sums of k (C v)^T into the scanned ``memory``."""
    sequence, block, start = place(blocks, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = start + rows < length, (start + rows + 1).to(tl.float32)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    v = tile(values + offset, rows, in_token, valid, WIDTH)
    e = exponential(per_token(flows, SOURCE, sequence, sequences, start, length, rows, valid), clamp)
    normaliser = tl.load(exponentials + sequence * (blocks + 1) + block) + tl.cumsum(e, 0)
    store_per_token(flows, NORMALISER, sequence, sequences, start, length, rows, valid, normaliser)
    block_memory = tl.dot(tl.trans(k), (n * e / normaliser)[:, None] * v, input_precision=VALUES)
    store_matrix(memory, sequence, block + 1, blocks, block_memory, WIDTH)


@triton.jit
def outputs_kernel(
    queries, keys, values, outputs, memory, flows, heads, sequences, length, blocks,
    in_batch, in_head, in_token, out_batch, out_head, out_token, clamp,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pass 5: the outputs, of the block's own pairs and the memory before it."""
    sequence, block, start = place(blocks, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = start + rows < length, (start + rows + 1).to(tl.float32)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    v = tile(values + offset, rows, in_token, valid, WIDTH)
    incoming = per_token(flows, INCOMING, sequence, sequences, start, length, rows, valid)
    sink = per_token(flows, SINK, sequence, sequences, start, length, rows, valid)
    e = exponential(per_token(flows, SOURCE, sequence, sequences, start, length, rows, valid), clamp)
    normaliser = per_token(flows, NORMALISER, sequence, sequences, start, length, rows, valid)
    competed = (n * e / normaliser)[:, None] * v
    past_memory = matrix(memory, sequence, block, blocks, WIDTH)
    weights = lower(tl.dot(q, tl.trans(k), input_precision=VALUES), TOKENS)
    aggregated = tl.dot(q, past_memory, input_precision=VALUES)
    aggregated += tl.dot(weights, competed, input_precision=VALUES)
    result = (tl.sigmoid(sink) / incoming)[:, None] * aggregated
    offset = corner(sequence, start, heads, out_batch, out_head, out_token)
    store_tile(outputs + offset, rows, out_token, valid, result, WIDTH)


@triton.jit
def window_flows(gram, q, k, n, eps, clamp, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Everything about the tokens of a sequence of one block: I, O, conserved sink and source, normaliser."""
    pairs = past_pairs(gram, k, eps, TOKENS)
    source_pairs = past_pairs_of_sources(gram, q, eps, TOKENS)
    incoming = tl.sum(pairs, 1) + eps_flow(q, eps, WIDTH)
    outgoing = tl.sum(source_pairs, 0) + eps_flow(k, eps, WIDTH)
    sink = (tl.sum(pairs * (n / outgoing)[None, :], 1) + eps_flow(q, eps, WIDTH)) / n
    source = (tl.sum(source_pairs * (n / incoming)[:, None], 0) + eps_flow(k, eps, WIDTH)) / n
    return incoming, outgoing, sink, source, tl.cumsum(exponential(source, clamp), 0)


@triton.jit
def window_kernel(
    queries, keys, values, outputs, heads, length, in_batch, in_head, in_token,
    out_batch, out_head, out_token, eps, clamp,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The whole forward of a sequence of at most TOKENS tokens."""
    sequence, _, start = place(1, TOKENS)
    rows = tl.arange(0, TOKENS)
    valid, n = rows < length, (rows + 1).to(tl.float32)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    v = tile(values + offset, rows, in_token, valid, WIDTH)
    gram = tl.dot(q, tl.trans(k), input_precision=SUMS)
    incoming, _, sink, source, normaliser = window_flows(gram, q, k, n, eps, clamp, TOKENS, WIDTH)
    competed = (n * exponential(source, clamp) / normaliser)[:, None] * v
    aggregated = tl.dot(lower(gram, TOKENS), competed, input_precision=VALUES)
    result = (tl.sigmoid(sink) / incoming)[:, None] * aggregated
    offset = corner(sequence, start, heads, out_batch, out_head, out_token)
    store_tile(outputs + offset, rows, out_token, valid, result, WIDTH)

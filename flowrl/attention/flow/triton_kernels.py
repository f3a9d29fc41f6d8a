"""Triton kernels of causal Flow-Attention, forward and backward: one program per block of TOKENS tokens.

A sequence of one block takes one kernel each way, ``window_kernel`` and ``grad_window_kernel``. Longer ones
take five passes each way; between them torch turns the blocks' sums into prefix sums. The formulas are those
of :mod:`flowrl.attention.flow.blocks`. This module imports triton and is itself imported only by
:mod:`flowrl.attention.flow.triton`.

Everything is float32 once loaded. SUMS is how the products behind flows and normalisers are made, VALUES how
those behind outputs and gradients are.

Layouts: ``queries``, ``keys``, ``values`` share the strides ``in_batch, in_head, in_token``, results have
``out_*``; ``flows`` is (5, sequences, length): I, O, conserved sink, conserved source, normaliser. A scanned
buffer is (sequences, blocks + 1, ...): block b adds its sum at b + 1 and finds its prefix at b. Backward,
slots count blocks from the last one: block b adds at ``blocks - b`` and finds what later blocks added at
``blocks - 1 - b``. ``grads`` is (5, sequences, length): the gradient times the output, and the gradients by
C, by n times the conserved source, by I and by O; what a pass needs of the conserved sink's gradient follows
from the first.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators
# Arguments of kernels are pointers and numbers of the device: triton reads no annotation but constexpr.

import triton
import triton.language as tl

# Numbers that change between batches: no kernel is compiled anew where one is 1 or a multiple of 16.
COUNTS = ("heads", "sequences", "length", "blocks")

SUMS: tl.constexpr = tl.constexpr("tf32x3")  # three products of TensorFloat-32 parts: as exact as float32

# Rows of ``flows``.
INCOMING: tl.constexpr = tl.constexpr(0)
OUTGOING: tl.constexpr = tl.constexpr(1)
SINK: tl.constexpr = tl.constexpr(2)
SOURCE: tl.constexpr = tl.constexpr(3)
NORMALISER: tl.constexpr = tl.constexpr(4)


@triton.jit
def place(blocks, length, TOKENS: tl.constexpr):
    """This program's sequence (int64) and block; the block's first token, rows, valid rows, and their n."""
    program, rows = tl.program_id(0), tl.arange(0, TOKENS)
    start = (program % blocks) * TOKENS
    n = (start + rows + 1).to(tl.float32)
    return (program // blocks).to(tl.int64), program % blocks, start, rows, start + rows < length, n


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
def per_token(pointer, row, sequence, sequences, start, length, rows, valid, other=1.0):
    """One row of a (rows, sequences, length) tensor for a block; ``other`` past the end: ones may divide."""
    address = pointer + (row * sequences + sequence) * length + start + rows
    return tl.load(address, mask=valid, other=other)


@triton.jit
def store_per_token(pointer, row, sequence, sequences, start, length, rows, valid, x):
    tl.store(pointer + (row * sequences + sequence) * length + start + rows, x, mask=valid)


@triton.jit
def vector(pointer, sequence, slot, blocks, WIDTH: tl.constexpr):
    """Addresses of entry ``slot`` (WIDTH,) of a scanned buffer of vectors."""
    return pointer + (sequence * (blocks + 1) + slot) * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def matrix(pointer, sequence, slot, blocks, WIDTH: tl.constexpr):
    """Addresses of entry ``slot`` (WIDTH, WIDTH) of a scanned buffer of matrices."""
    places = tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return pointer + (sequence * (blocks + 1) + slot) * WIDTH * WIDTH + places


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
    """(x + eps) . vector for each row, (TOKENS,); the vector is given by its addresses."""
    past = tl.load(vector)
    return tl.sum(x * past[None, :], 1) + eps * tl.sum(past, 0)


@triton.jit
def weighted_sum(weight, x):
    """The sum of weight_i x_i over rows, (WIDTH,)."""
    return tl.sum(weight[:, None] * x, 0)


@triton.jit
def exponential(source, clamp):
    return tl.exp(tl.minimum(tl.maximum(source, -clamp), clamp))


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    queries, keys, sums, heads, sequences, length, blocks, in_batch, in_head, in_token,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 1: the blocks' sums of k and q into the scanned ``sums`` (2, sequences, blocks + 1, WIDTH)."""
    sequence, block, start, rows, valid, _ = place(blocks, length, TOKENS)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    tl.store(vector(sums, sequence, block + 1, blocks, WIDTH), tl.sum(k, 0))
    tl.store(vector(sums, sequences + sequence, block + 1, blocks, WIDTH), tl.sum(q, 0))


@triton.jit(do_not_specialize=COUNTS)
def flows_kernel(
    queries, keys, sums, weighted, flows, heads, sequences, length, blocks, in_batch, in_head, in_token, eps,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 2: I and O, and the blocks' sums of (n / O) k and (n / I) q into the scanned ``weighted``."""
    sequence, block, start, rows, valid, n = place(blocks, length, TOKENS)
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
    tl.store(vector(weighted, sequence, block + 1, blocks, WIDTH), weighted_sum(n / outgoing, k))
    tl.store(vector(weighted, sequences + sequence, block + 1, blocks, WIDTH), weighted_sum(n / incoming, q))


@triton.jit(do_not_specialize=COUNTS)
def conserved_kernel(
    queries, keys, weighted, exponentials, flows, heads, sequences, length, blocks,
    in_batch, in_head, in_token, eps, clamp, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 3: the conserved flows, and the blocks' sums of exp(source) into ``exponentials``."""
    sequence, block, start, rows, valid, n = place(blocks, length, TOKENS)
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


@triton.jit(do_not_specialize=COUNTS)
def memory_kernel(
    keys, values, exponentials, memory, flows, heads, sequences, length, blocks, in_batch, in_head, in_token,
    clamp, TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pass 4: the normalisers, and the blocks' sums of k (C v)^T into the scanned ``memory``."""
    sequence, block, start, rows, valid, n = place(blocks, length, TOKENS)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    v = tile(values + offset, rows, in_token, valid, WIDTH)
    e = exponential(per_token(flows, SOURCE, sequence, sequences, start, length, rows, valid), clamp)
    normaliser = tl.load(exponentials + sequence * (blocks + 1) + block) + tl.cumsum(e, 0)
    store_per_token(flows, NORMALISER, sequence, sequences, start, length, rows, valid, normaliser)
    block_memory = tl.dot(tl.trans(k), (n * e / normaliser)[:, None] * v, input_precision=VALUES)
    tl.store(matrix(memory, sequence, block + 1, blocks, WIDTH), block_memory)


@triton.jit(do_not_specialize=COUNTS)
def outputs_kernel(
    queries, keys, values, outputs, memory, flows, heads, sequences, length, blocks,
    in_batch, in_head, in_token, out_batch, out_head, out_token, clamp,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pass 5: the outputs, of the block's own pairs and the memory before it."""
    sequence, block, start, rows, valid, n = place(blocks, length, TOKENS)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    v = tile(values + offset, rows, in_token, valid, WIDTH)
    incoming = per_token(flows, INCOMING, sequence, sequences, start, length, rows, valid)
    sink = per_token(flows, SINK, sequence, sequences, start, length, rows, valid)
    e = exponential(per_token(flows, SOURCE, sequence, sequences, start, length, rows, valid), clamp)
    normaliser = per_token(flows, NORMALISER, sequence, sequences, start, length, rows, valid)
    competed = (n * e / normaliser)[:, None] * v
    past_memory = tl.load(matrix(memory, sequence, block, blocks, WIDTH))
    weights = lower(tl.dot(q, tl.trans(k), input_precision=VALUES), TOKENS)
    aggregated = tl.dot(q, past_memory, input_precision=VALUES)
    aggregated += tl.dot(weights, competed, input_precision=VALUES)
    result = (tl.sigmoid(sink) / incoming)[:, None] * aggregated
    offset = corner(sequence, start, heads, out_batch, out_head, out_token)
    store_tile(outputs + offset, rows, out_token, valid, result, WIDTH)


@triton.jit
def window_flows(gram, q, k, n, valid, eps, clamp, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Everything about the tokens of a sequence of one block: I, O, conserved sink and source, normaliser."""
    pairs = past_pairs(gram, k, eps, TOKENS)
    source_pairs = past_pairs_of_sources(gram, q, eps, TOKENS)
    # Past the end flows are 0 without eps.
    incoming = tl.where(valid, tl.sum(pairs, 1) + eps_flow(q, eps, WIDTH), 1.0)
    outgoing = tl.where(valid, tl.sum(source_pairs, 0) + eps_flow(k, eps, WIDTH), 1.0)
    sink = (tl.sum(pairs * (n / outgoing)[None, :], 1) + eps_flow(q, eps, WIDTH)) / n
    source = (tl.sum(source_pairs * (n / incoming)[:, None], 0) + eps_flow(k, eps, WIDTH)) / n
    return incoming, outgoing, sink, source, tl.cumsum(exponential(source, clamp), 0)


@triton.jit(do_not_specialize=COUNTS)
def window_kernel(
    queries, keys, values, outputs, heads, length, in_batch, in_head, in_token,
    out_batch, out_head, out_token, eps, clamp,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The whole forward of a sequence of at most TOKENS tokens."""
    sequence, _, start, rows, valid, n = place(1, length, TOKENS)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    v = tile(values + offset, rows, in_token, valid, WIDTH)
    gram = tl.dot(q, tl.trans(k), input_precision=SUMS)
    incoming, _, sink, source, normaliser = window_flows(gram, q, k, n, valid, eps, clamp, TOKENS, WIDTH)
    competed = (n * exponential(source, clamp) / normaliser)[:, None] * v
    aggregated = tl.dot(lower(gram, TOKENS), competed, input_precision=VALUES)
    result = (tl.sigmoid(sink) / incoming)[:, None] * aggregated
    offset = corner(sequence, start, heads, out_batch, out_head, out_token)
    store_tile(outputs + offset, rows, out_token, valid, result, WIDTH)


# Backward ---------------------------------------------------------------------------------------------------

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


@triton.jit(do_not_specialize=COUNTS)
def grad_memory_kernel(
    queries, outputs, g_outputs, g_memory, g_weighted, flows, grads, heads, sequences, length, blocks,
    in_batch, in_head, in_token, out_batch, out_head, out_token, eps,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pass 1: what later blocks need of this one's outputs: gradients by the memory and by sum of (n/O) k."""
    sequence, block, start, rows, valid, n = place(blocks, length, TOKENS)
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
    g_block_memory = tl.dot(tl.trans(q), g_aggregated, input_precision=VALUES)
    tl.store(matrix(g_memory, sequence, slot, blocks, WIDTH), g_block_memory)
    tl.store(vector(g_weighted, sequence, slot, blocks, WIDTH), weighted_sum(g_sink, q + eps))


@triton.jit(do_not_specialize=COUNTS)
def grad_values_kernel(
    queries, keys, values, g_outputs, g_values, g_memory, g_exponentials, flows, grads,
    heads, sequences, length, blocks, in_batch, in_head, in_token, out_batch, out_head, out_token, clamp,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pass 2: the gradients by the values and by the competition."""
    sequence, block, start, rows, valid, n = place(blocks, length, TOKENS)
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
    later_memory = tl.load(matrix(g_memory, sequence, blocks - 1 - block, blocks, WIDTH))
    g_competed = tl.dot(k, later_memory, input_precision=VALUES)
    g_competed += tl.dot(tl.trans(weights), g_aggregated, input_precision=VALUES)
    store_tile(g_values + offset, rows, out_token, valid, competition[:, None] * g_competed, WIDTH)
    g_competition = tl.sum(g_competed * v, 1)
    store_per_token(grads, G_COMPETITION, sequence, sequences, start, length, rows, valid, g_competition)
    g_normaliser = tl.sum(-g_competition * competition / normaliser, 0)
    tl.store(g_exponentials + sequence * (blocks + 1) + blocks - block, g_normaliser)


@triton.jit(do_not_specialize=COUNTS)
def grad_source_kernel(
    keys, g_exponentials, g_weighted, flows, grads, heads, sequences, length, blocks,
    in_batch, in_head, in_token, eps, clamp, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 3: the gradient by the conserved source, and from it by the sum of (n/I) q."""
    sequence, block, start, rows, valid, n = place(blocks, length, TOKENS)
    k = opened(
        keys + corner(sequence, start, heads, in_batch, in_head, in_token), rows, in_token, valid, WIDTH
    )
    source = per_token(flows, SOURCE, sequence, sequences, start, length, rows, valid)
    normaliser = per_token(flows, NORMALISER, sequence, sequences, start, length, rows, valid)
    g_competition = per_token(grads, G_COMPETITION, sequence, sequences, start, length, rows, valid, 0.0)
    g_normaliser = -g_competition * n * exponential(source, clamp) / (normaliser * normaliser)
    later = tl.load(g_exponentials + sequence * (blocks + 1) + blocks - 1 - block)
    g_normalisers = later_sum(g_normaliser, TOKENS) + later
    g_source = gradient_of_source(g_competition, g_normalisers, source, normaliser, n, clamp)
    g_source = tl.where(valid, g_source, 0.0)
    store_per_token(grads, G_SOURCE, sequence, sequences, start, length, rows, valid, g_source)
    sequences_before = sequences + sequence  # the second half of the buffer
    tl.store(
        vector(g_weighted, sequences_before, blocks - block, blocks, WIDTH), weighted_sum(g_source, k + eps)
    )


@triton.jit(do_not_specialize=COUNTS)
def grad_flows_kernel(
    queries, keys, g_weighted, g_sums, flows, grads, heads, sequences, length, blocks,
    in_batch, in_head, in_token, eps, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 4: the gradients by I and O, and from them by the sums of k and q."""
    sequence, block, start, rows, valid, n = place(blocks, length, TOKENS)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    incoming = per_token(flows, INCOMING, sequence, sequences, start, length, rows, valid)
    outgoing = per_token(flows, OUTGOING, sequence, sequences, start, length, rows, valid)
    allocation = tl.sigmoid(per_token(flows, SINK, sequence, sequences, start, length, rows, valid))
    product = per_token(grads, PRODUCT, sequence, sequences, start, length, rows, valid, 0.0)
    g_source = per_token(grads, G_SOURCE, sequence, sequences, start, length, rows, valid, 0.0)
    g_sink = product * (1 - allocation) / n
    slot = blocks - 1 - block
    later_keys = tl.load(vector(g_weighted, sequence, slot, blocks, WIDTH))
    later_queries = tl.load(vector(g_weighted, sequences + sequence, slot, blocks, WIDTH))
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
    tl.store(vector(g_sums, sequence, slot, blocks, WIDTH), weighted_sum(g_incoming, q + eps))
    tl.store(vector(g_sums, sequences + sequence, slot, blocks, WIDTH), weighted_sum(g_outgoing, k + eps))


@triton.jit(do_not_specialize=COUNTS)
def grad_inputs_kernel(
    queries, keys, values, g_outputs, g_queries, g_keys, sums, weighted, memory, g_sums, g_weighted, g_memory,
    flows, grads, heads, sequences, length, blocks, in_batch, in_head, in_token,
    out_batch, out_head, out_token, eps, clamp,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pass 5: the gradients by queries and keys, of the block's own pairs, the past and the future."""
    sequence, block, start, rows, valid, n = place(blocks, length, TOKENS)
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
    product = per_token(grads, PRODUCT, sequence, sequences, start, length, rows, valid, 0.0)
    g_source = per_token(grads, G_SOURCE, sequence, sequences, start, length, rows, valid, 0.0)
    g_incoming = per_token(grads, G_INCOMING, sequence, sequences, start, length, rows, valid, 0.0)
    g_outgoing = per_token(grads, G_OUTGOING, sequence, sequences, start, length, rows, valid, 0.0)
    sink_weight, source_weight = n / incoming, n / outgoing
    g_sink = product * (1 - allocation) / n
    g_aggregated = (allocation / incoming)[:, None] * g_output
    competed = (n * exponential(source, clamp) / normaliser)[:, None] * v
    g_q, g_k = block_gradients(
        q, k, g_aggregated, competed, g_sink, g_source, g_incoming, g_outgoing, sink_weight, source_weight,
        eps, TOKENS, VALUES,
    )  # fmt: skip
    second, slot = sequences + sequence, blocks - 1 - block
    past_memory = tl.load(matrix(memory, sequence, block, blocks, WIDTH))
    g_q += tl.dot(g_aggregated, tl.trans(past_memory), input_precision=VALUES)
    g_q += g_incoming[:, None] * tl.load(vector(sums, sequence, block, blocks, WIDTH))[None, :]
    g_q += g_sink[:, None] * tl.load(vector(weighted, sequence, block, blocks, WIDTH))[None, :]
    g_q += sink_weight[:, None] * tl.load(vector(g_weighted, second, slot, blocks, WIDTH))[None, :]
    g_q += tl.load(vector(g_sums, second, slot, blocks, WIDTH))[None, :]
    store_tile(g_queries + offset, rows, out_token, valid, g_q * q * (1 - q), WIDTH)
    later_memory = tl.load(matrix(g_memory, sequence, slot, blocks, WIDTH))
    g_k += tl.dot(competed, tl.trans(later_memory), input_precision=VALUES)
    g_k += g_outgoing[:, None] * tl.load(vector(sums, second, block, blocks, WIDTH))[None, :]
    g_k += g_source[:, None] * tl.load(vector(weighted, second, block, blocks, WIDTH))[None, :]
    g_k += source_weight[:, None] * tl.load(vector(g_weighted, sequence, slot, blocks, WIDTH))[None, :]
    g_k += tl.load(vector(g_sums, sequence, slot, blocks, WIDTH))[None, :]
    store_tile(g_keys + offset, rows, out_token, valid, g_k * k * (1 - k), WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def grad_window_kernel(
    queries, keys, values, g_outputs, g_queries, g_keys, g_values, heads, length,
    in_batch, in_head, in_token, out_batch, out_head, out_token, eps, clamp,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The whole backward of a sequence of at most TOKENS tokens; its flows and outputs are found again."""
    sequence, _, start, rows, valid, n = place(1, length, TOKENS)
    offset = corner(sequence, start, heads, in_batch, in_head, in_token)
    q = opened(queries + offset, rows, in_token, valid, WIDTH)
    k = opened(keys + offset, rows, in_token, valid, WIDTH)
    v = tile(values + offset, rows, in_token, valid, WIDTH)
    offset = corner(sequence, start, heads, out_batch, out_head, out_token)
    g_output = tile(g_outputs + offset, rows, out_token, valid, WIDTH)
    gram = tl.dot(q, tl.trans(k), input_precision=SUMS)
    incoming, outgoing, sink, source, normaliser = window_flows(
        gram, q, k, n, valid, eps, clamp, TOKENS, WIDTH
    )
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

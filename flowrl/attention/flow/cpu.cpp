// Causal Flow-Attention on CPUs, compiled on first use for one type of numbers
// and one width of heads, REAL and WIDTH, and called by cpu.py.
//
// Notation as in blocks.py. A sequence (one head of one batch row) is one thread's work, from its first block of
// tokens to its last, so that everything stays in that core's cache and no result depends on the number of
// threads. Flows are dot products with running vector sums, token after token, as in the recurrent form; only
// the pairs of tokens of a block and the memory matrix take matrix products. Sums run over a block first and
// are then added to the past, which keeps them exact over long sequences.

#include <initializer_list>

#include "attention/flow/layout.h"
#include "native/vector_math.h"

namespace {

// What the forward pass leaves for the backward pass, per sequence: FLOWS rows of (length), and what precedes
// each block, SUMS rows of (D), and the memory (D, D).
enum Flow { INCOMING, OUTGOING, SINK, SOURCE, NORMALISER, FLOWS };
enum Sum { KEYS, QUERIES, WEIGHTED_KEYS, WEIGHTED_QUERIES, SUMS };

constexpr int D = WIDTH;   // head_dim and value_dim
constexpr int BLOCK = 64;  // tokens
constexpr int L = LANES, W = D / L;  // vectors in a row
static_assert(D % L == 0 && BLOCK % L == 0);
constexpr int ROW = BLOCK * D, SQUARE = BLOCK * BLOCK;

struct Row { Vec v[W]; };
inline Row row(const T* from) {
    Row r;
    for (int w = 0; w < W; w++) r.v[w] = load(from + w * L);
    return r;
}
inline void put(T* to, const Row& r) {
    for (int w = 0; w < W; w++) store(to + w * L, r.v[w]);
}
inline void add(Row& r, T factor, const Row& x) {
    for (int w = 0; w < W; w++) r.v[w] += factor * x.v[w];
}
inline Row plus(const Row& x, const Row& y) {
    Row r;
    for (int w = 0; w < W; w++) r.v[w] = x.v[w] + y.v[w];
    return r;
}
inline Row plus(const Row& x, T y) {
    Row r;
    for (int w = 0; w < W; w++) r.v[w] = x.v[w] + y;
    return r;
}
inline T dot(const Row& x, const Row& y) {
    Vec sum = x.v[0] * y.v[0];
    for (int w = 1; w < W; w++) sum += x.v[w] * y.v[w];
    return total(sum);
}
// Prefetch a row: those of one head are too far apart for the hardware prefetcher.
inline void fetch(const T* from) {
    for (int w = 0; w < W; w++) __builtin_prefetch(from + w * L, 0, 2);
}
inline void fetch(T* to) {  // about to be written
    for (int w = 0; w < W; w++) __builtin_prefetch(to + w * L, 1, 2);
}

// Rows after their sigmoid; meanwhile the rows of ``next`` are asked for.
void opened(const T* from, int64_t stride, int tokens, T* to, std::initializer_list<const T*> next = {},
            int64_t next_stride = 0) {
    constexpr int AHEAD = 8;
    for (int t = 0; t < tokens; t++) {
        if (t + AHEAD < tokens) fetch(from + (t + AHEAD) * stride);
        for (const T* other : next) fetch(other + t * next_stride);
        for (int w = 0; w < W; w++) store(to + t * D + w * L, sigmoid(load(from + t * stride + w * L)));
    }
}
void exponentials(const T* source, T clamp, int tokens, T* to) {  // buffers of BLOCK
    for (int t = 0; t < tokens; t += L) {
        Vec x = load(source + t);
        x = x > clamp ? Vec{} + clamp : x;
        x = x < -clamp ? Vec{} - clamp : x;
        store(to + t, exponential(x));
    }
}

// One sequence forward. flows (FLOWS, length), sums (blocks, SUMS, D) and memories (blocks, D, D) may be null.
constexpr int FORWARD_BUFFER = 5 * ROW + SQUARE + D * D + 7 * BLOCK;
void forward(Buffer& buffer, const Layout& at, const T* queries, const T* keys, const T* values, T* outputs, T* flows,
             T* sums, T* memories) {
    const T eps = at.eps, clamp = at.clamp;
    buffer.restart();
    T *q = buffer.take(ROW), *k = buffer.take(ROW), *k_across = buffer.take(ROW), *competed = buffer.take(ROW),
      *result = buffer.take(ROW), *gram = buffer.take(SQUARE), *memory = buffer.take(D * D);
    T *incoming = buffer.take(BLOCK), *outgoing = buffer.take(BLOCK), *sink = buffer.take(BLOCK),
      *source = buffer.take(BLOCK), *normaliser = buffer.take(BLOCK), *exps = buffer.take(BLOCK),
      *allocation = buffer.take(BLOCK);
    std::fill(memory, memory + D * D, T(0));
    Row past[SUMS] = {};
    T past_exps = 0;
    for (int64_t start = 0, block = 0; start < at.length; start += BLOCK, block++) {
        const int tokens = std::min<int64_t>(BLOCK, at.length - start);
        const bool goes_on = start + BLOCK < at.length;
        const int64_t in = start * at.in_token;
        opened(queries + in, at.in_token, tokens, q, {keys + in}, at.in_token);
        opened(keys + in, at.in_token, tokens, k, {values + in}, at.in_token);
        if (sums)
            for (int s = 0; s < SUMS; s++) put(sums + (block * SUMS + s) * D, past[s]);
        if (memories) std::copy(memory, memory + D * D, memories + block * D * D);
        Row own[SUMS] = {}, before[SUMS];
        for (int s = 0; s < SUMS; s++) before[s] = plus(past[s], eps);
        for (int t = 0; t < tokens; t++) {
            const Row qt = row(q + t * D), kt = row(k + t * D);
            add(own[KEYS], 1, kt);
            add(own[QUERIES], 1, qt);
            incoming[t] = dot(plus(qt, eps), plus(before[KEYS], own[KEYS]));
            outgoing[t] = dot(plus(kt, eps), plus(before[QUERIES], own[QUERIES]));
        }
        for (int t = 0; t < tokens; t++) {  // a loop of its own, which needs no more registers than there are
            const T n = start + t + 1;
            const Row qt = row(q + t * D), kt = row(k + t * D);
            add(own[WEIGHTED_KEYS], n / outgoing[t], kt);
            add(own[WEIGHTED_QUERIES], n / incoming[t], qt);
            sink[t] = dot(plus(qt, eps), plus(before[WEIGHTED_KEYS], own[WEIGHTED_KEYS])) / n;
            source[t] = dot(plus(kt, eps), plus(before[WEIGHTED_QUERIES], own[WEIGHTED_QUERIES])) / n;
        }
        for (int s = 0; s < SUMS; s++) past[s] = plus(past[s], own[s]);
        exponentials(source, clamp, tokens, exps);
        T own_exps = 0;
        for (int t = 0; t < tokens; t++) {
            own_exps += exps[t];
            normaliser[t] = past_exps + own_exps;
            const T competition = (start + t + 1) * exps[t] / normaliser[t];
            const T* value = values + (start + t) * at.in_token;
            fetch(outputs + (start + t) * at.out_token);
            for (int w = 0; w < W; w++) store(competed + t * D + w * L, competition * load(value + w * L));
        }
        past_exps += own_exps;
        if (flows) {
            const T* kept[FLOWS] = {incoming, outgoing, sink, source, normaliser};
            for (int f = 0; f < FLOWS; f++) std::copy(kept[f], kept[f] + tokens, flows + f * at.length + start);
        }
        transpose(k, D, tokens, D, k_across, BLOCK);
        product(gram, BLOCK, tokens, tokens, q, D, 1, k_across, BLOCK, D, ALL, UP_TO_DIAGONAL);
        keep_lower(gram, BLOCK, tokens);
        product(result, D, tokens, D, gram, BLOCK, 1, competed, D, tokens, UP_TO_ROW);
        if (block > 0) product(result, D, tokens, D, q, D, 1, memory, D, D, ALL, EVERY, true);
        if (goes_on) product(memory, D, D, D, k, 1, D, competed, D, tokens, ALL, EVERY, true);
        sigmoids(sink, tokens, allocation);
        for (int t = 0; t < tokens; t++) {
            const T scale = allocation[t] / incoming[t];
            T* output = outputs + (start + t) * at.out_token;
            for (int w = 0; w < W; w++) store(output + w * L, scale * load(result + t * D + w * L));
        }
    }
}

// The gradient of one sequence, from its last block to its first.
constexpr int BACKWARD_BUFFER = 8 * ROW + 2 * SQUARE + 2 * D * D + 8 * BLOCK;
void backward(Buffer& buffer, const Layout& at, const T* queries, const T* keys, const T* values, const T* outputs,
                     const T* g_outputs, const T* flows, const T* sums, const T* memories, T* g_queries,
                     T* g_keys, T* g_values) {
    const T eps = at.eps, clamp = at.clamp;
    buffer.restart();
    T *q = buffer.take(ROW), *k = buffer.take(ROW), *across = buffer.take(ROW), *competed = buffer.take(ROW),
      *g_aggregated = buffer.take(ROW), *g_competed = buffer.take(ROW), *g_q = buffer.take(ROW),
      *g_k = buffer.take(ROW);
    T *gram = buffer.take(SQUARE), *g_gram = buffer.take(SQUARE);
    T *later_memory = buffer.take(D * D), *turned = buffer.take(D * D);
    T *exps = buffer.take(BLOCK), *competition = buffer.take(BLOCK), *product_of = buffer.take(BLOCK),
      *g_sink = buffer.take(BLOCK), *g_source = buffer.take(BLOCK), *g_incoming = buffer.take(BLOCK),
      *g_outgoing = buffer.take(BLOCK), *allocation = buffer.take(BLOCK);
    std::fill(later_memory, later_memory + D * D, T(0));
    Row later[SUMS] = {};
    T later_exps = 0;
    const int64_t blocks = (at.length + BLOCK - 1) / BLOCK;
    for (int64_t block = blocks - 1; block >= 0; block--) {
        const int64_t start = block * BLOCK;
        const int tokens = std::min<int64_t>(BLOCK, at.length - start);
        const bool has_past = block > 0, has_later = block + 1 < blocks;
        const T *incoming = flows + INCOMING * at.length + start, *outgoing = flows + OUTGOING * at.length + start,
                *sink = flows + SINK * at.length + start, *source = flows + SOURCE * at.length + start,
                *normaliser = flows + NORMALISER * at.length + start;
        const int64_t in = start * at.in_token, out = start * at.out_token;
        opened(queries + in, at.in_token, tokens, q, {keys + in, values + in}, at.in_token);
        opened(keys + in, at.in_token, tokens, k, {outputs + out, g_outputs + out}, at.out_token);
        std::copy(source, source + tokens, exps);
        exponentials(exps, clamp, tokens, exps);
        std::copy(sink, sink + tokens, allocation);
        sigmoids(allocation, tokens, allocation);
        for (int t = 0; t < tokens; t++) {  // output = (sigmoid(sink) / I) (tril(G) (C v) + q M)
            const T n = start + t + 1, scale = allocation[t] / incoming[t];
            const T* value = values + (start + t) * at.in_token;
            const Row g_output = row(g_outputs + (start + t) * at.out_token);
            fetch(g_values + (start + t) * at.out_token);
            product_of[t] = dot(g_output, row(outputs + (start + t) * at.out_token));
            g_sink[t] = product_of[t] * (1 - allocation[t]) / n;  // of n times the conserved sink
            competition[t] = n * exps[t] / normaliser[t];
            for (int w = 0; w < W; w++) {
                store(g_aggregated + t * D + w * L, scale * g_output.v[w]);
                store(competed + t * D + w * L, competition[t] * load(value + w * L));
            }
        }
        transpose(k, D, tokens, D, across, BLOCK);
        product(gram, BLOCK, tokens, tokens, q, D, 1, across, BLOCK, D, ALL, UP_TO_DIAGONAL);
        keep_lower(gram, BLOCK, tokens);
        product(g_competed, D, tokens, D, gram, 1, BLOCK, g_aggregated, D, tokens, FROM_ROW);
        if (has_later) product(g_competed, D, tokens, D, k, D, 1, later_memory, D, D, ALL, EVERY, true);

        T tail = later_exps;
        for (int t = tokens - 1; t >= 0; t--) {  // C = n exp(S) / (past sum of exp(S))
            const T n = start + t + 1;
            const Row g = row(g_competed + t * D);
            fetch(g_queries + (start + t) * at.out_token);
            const T g_competition = dot(g, row(values + (start + t) * at.in_token));
            T* g_value = g_values + (start + t) * at.out_token;
            for (int w = 0; w < W; w++) store(g_value + w * L, competition[t] * g.v[w]);
            tail -= g_competition * competition[t] / normaliser[t];
            const bool inside = source[t] >= -clamp && source[t] <= clamp;
            g_source[t] = inside ? (g_competition * n / normaliser[t] + tail) * exps[t] / n : 0;
        }
        later_exps = tail;

        transpose(competed, D, tokens, D, across, BLOCK);
        product(g_gram, BLOCK, tokens, tokens, g_aggregated, D, 1, across, BLOCK, D, ALL, UP_TO_DIAGONAL);
        keep_lower(g_gram, BLOCK, tokens);
        product(g_q, D, tokens, D, g_gram, BLOCK, 1, k, D, tokens, UP_TO_ROW);
        product(g_k, D, tokens, D, g_gram, 1, BLOCK, q, D, tokens, FROM_ROW);
        if (has_past) {
            transpose(memories + block * D * D, D, D, D, turned, D);
            product(g_q, D, tokens, D, g_aggregated, D, 1, turned, D, D, ALL, EVERY, true);
        }
        if (has_later) {
            transpose(later_memory, D, D, D, turned, D);
            product(g_k, D, tokens, D, competed, D, 1, turned, D, D, ALL, EVERY, true);
        }
        if (has_past) product(later_memory, D, D, D, q, 1, D, g_aggregated, D, tokens, ALL, EVERY, true);

        Row own[SUMS] = {};  // sums over this and later tokens: gradients by the four running sums
        for (int t = tokens - 1; t >= 0; t--) {
            const T n = start + t + 1, sink_weight = n / incoming[t], source_weight = n / outgoing[t];
            const Row qt = row(q + t * D), kt = row(k + t * D), qe = plus(qt, eps), ke = plus(kt, eps);
            fetch(g_keys + (start + t) * at.out_token);
            add(own[WEIGHTED_QUERIES], g_source[t], ke);
            add(own[WEIGHTED_KEYS], g_sink[t], qe);
            const Row by_wq = plus(later[WEIGHTED_QUERIES], own[WEIGHTED_QUERIES]);
            const Row by_wk = plus(later[WEIGHTED_KEYS], own[WEIGHTED_KEYS]);
            g_incoming[t] = -(product_of[t] + dot(qt, by_wq) * sink_weight) / incoming[t];
            g_outgoing[t] = -dot(kt, by_wk) * source_weight / outgoing[t];
            add(own[KEYS], g_incoming[t], qe);
            add(own[QUERIES], g_outgoing[t], ke);
            Row g = plus(row(g_q + t * D), plus(later[QUERIES], own[QUERIES]));
            add(g, sink_weight, by_wq);
            put(g_q + t * D, g);
            g = plus(row(g_k + t * D), plus(later[KEYS], own[KEYS]));
            add(g, source_weight, by_wk);
            put(g_k + t * D, g);
        }
        for (int s = 0; s < SUMS; s++) later[s] = plus(later[s], own[s]);

        Row past[SUMS] = {}, seen[SUMS] = {};
        if (has_past)
            for (int s = 0; s < SUMS; s++) past[s] = row(sums + (block * SUMS + s) * D);
        for (int t = 0; t < tokens; t++) {
            const T n = start + t + 1;
            const Row qt = row(q + t * D), kt = row(k + t * D);
            add(seen[KEYS], 1, kt);
            add(seen[QUERIES], 1, qt);
            add(seen[WEIGHTED_KEYS], n / outgoing[t], kt);
            add(seen[WEIGHTED_QUERIES], n / incoming[t], qt);
            Row g = row(g_q + t * D);
            add(g, g_sink[t], plus(plus(past[WEIGHTED_KEYS], seen[WEIGHTED_KEYS]), eps));
            add(g, g_incoming[t], plus(plus(past[KEYS], seen[KEYS]), eps));
            T* to = g_queries + (start + t) * at.out_token;
            for (int w = 0; w < W; w++) store(to + w * L, g.v[w] * qt.v[w] * (T(1) - qt.v[w]));
            g = row(g_k + t * D);
            add(g, g_source[t], plus(plus(past[WEIGHTED_QUERIES], seen[WEIGHTED_QUERIES]), eps));
            add(g, g_outgoing[t], plus(plus(past[QUERIES], seen[QUERIES]), eps));
            to = g_keys + (start + t) * at.out_token;
            for (int w = 0; w < W; w++) store(to + w * L, g.v[w] * kt.v[w] * (T(1) - kt.v[w]));
        }
    }
}

// A few tokens of one sequence, at most MOST_STEPS, and its state, changed in place: the memory is read and
// written once for all of them.
constexpr int MOST_STEPS = 4;
void steps(const Layout& at, const T* queries, const T* keys, const T* values, T* outputs, T* num_tokens,
           T* const* sums, T* sum_exponentials, T* memory) {
    const T eps = at.eps, clamp = at.clamp;
    const int tokens = at.length;
    alignas(64) T q[MOST_STEPS][D], k[MOST_STEPS][D];
    Row competed[MOST_STEPS], result[MOST_STEPS] = {};
    T scale[MOST_STEPS];
    Row state[SUMS];
    for (int s = 0; s < SUMS; s++) state[s] = row(sums[s]);
    for (int t = 0; t < tokens; t++) {
        opened(queries + t * at.in_token, 0, 1, q[t]);
        opened(keys + t * at.in_token, 0, 1, k[t]);
        const Row qt = row(q[t]), kt = row(k[t]), qe = plus(qt, eps), ke = plus(kt, eps);
        const T n = *num_tokens += 1;
        add(state[KEYS], 1, kt);
        add(state[QUERIES], 1, qt);
        const T incoming = dot(qe, plus(state[KEYS], eps)), outgoing = dot(ke, plus(state[QUERIES], eps));
        add(state[WEIGHTED_KEYS], n / outgoing, kt);
        add(state[WEIGHTED_QUERIES], n / incoming, qt);
        const T sink = dot(qe, plus(state[WEIGHTED_KEYS], eps)) / n;
        const T source = dot(ke, plus(state[WEIGHTED_QUERIES], eps)) / n;
        const T exponential = std::exp(source > clamp ? clamp : source < -clamp ? -clamp : source);
        const T competition = n * exponential / (*sum_exponentials += exponential);
        scale[t] = 1 / (1 + std::exp(-sink)) / incoming;
        for (int w = 0; w < W; w++) competed[t].v[w] = competition * load(values + t * at.in_token + w * L);
        for (int s = 0; s <= t; s++) add(result[t], dot(qt, row(k[s])), competed[s]);
    }
    for (int s = 0; s < SUMS; s++) put(sums[s], state[s]);
    auto through = [&](auto count) {
        constexpr int N = decltype(count)::value;
        for (int d = 0; d < D; d++) {
            Row m = row(memory + d * D);
            for (int t = 0; t < N; t++) add(result[t], q[t][d], m);
            for (int t = 0; t < N; t++) add(m, k[t][d], competed[t]);
            put(memory + d * D, m);
        }
    };
    if (tokens == 1) through(std::integral_constant<int, 1>{});
    else if (tokens == 2) through(std::integral_constant<int, 2>{});
    else if (tokens == 3) through(std::integral_constant<int, 3>{});
    else through(std::integral_constant<int, 4>{});
    for (int t = 0; t < tokens; t++)
        for (int w = 0; w < W; w++) store(outputs + t * at.out_token + w * L, scale[t] * result[t].v[w]);
}
// Where a sequence's tokens begin.
inline int64_t in_corner(const Layout& at, int64_t s) {
    return s / at.heads * at.in_batch + s % at.heads * at.in_head;
}
inline int64_t out_corner(const Layout& at, int64_t s) {
    return s / at.heads * at.out_batch + s % at.heads * at.out_head;
}

}  // namespace

extern "C" void flow_forward(const Layout* layout, const T* q, const T* k, const T* v, T* out, T* flows, T* sums,
                             T* memories) {
    const Layout& at = *layout;
    const int64_t blocks = (at.length + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(at.threads)
    {
        Buffer buffer(FORWARD_BUFFER);
#pragma omp for schedule(dynamic)
        for (int64_t s = 0; s < at.batch * at.heads; s++) {
            const int64_t in = in_corner(at, s);
            forward(buffer, at, q + in, k + in, v + in, out + out_corner(at, s),
                    flows ? flows + s * FLOWS * at.length : nullptr,
                    sums ? sums + s * blocks * SUMS * D : nullptr,
                    memories ? memories + s * blocks * D * D : nullptr);
        }
    }
}

extern "C" void flow_backward(const Layout* layout, const T* q, const T* k, const T* v, const T* out, const T* g_out,
                              const T* flows, const T* sums, const T* memories, T* g_q, T* g_k, T* g_v) {
    const Layout& at = *layout;
    const int64_t blocks = (at.length + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(at.threads)
    {
        Buffer buffer(BACKWARD_BUFFER);
#pragma omp for schedule(dynamic)
        for (int64_t s = 0; s < at.batch * at.heads; s++) {
            const int64_t in = in_corner(at, s), to = out_corner(at, s);
            backward(buffer, at, q + in, k + in, v + in, out + to, g_out + to, flows + s * FLOWS * at.length,
                     sums ? sums + s * blocks * SUMS * D : nullptr,
                     memories ? memories + s * blocks * D * D : nullptr,
                     g_q + to, g_k + to, g_v + to);
        }
    }
}

// ``state`` are the tensors of a FlowState, in its order; ``first`` is their row of the first sequence.
extern "C" void flow_steps(const Layout* layout, const T* q, const T* k, const T* v, T* out, T* const* state,
                           int64_t first) {
    const Layout& at = *layout;
    for (int64_t s = 0; s < at.batch * at.heads; s++) {
        const int64_t in = in_corner(at, s), r = first + s;
        T* const sums[SUMS] = {state[1] + r * D, state[2] + r * D, state[3] + r * D, state[4] + r * D};
        steps(at, q + in, k + in, v + in, out + out_corner(at, s), state[0] + r, sums, state[5] + r,
              state[6] + r * D * D);
    }
}

// A few tokens of many episodes through all blocks of a Flow-Attention model, compiled on first use and called by
// acting.py. Each thread takes some episodes from the first block to the last: nothing is waited for in between,
// and no episode's numbers depend on the others or on the number of threads.

#include "attention/flow/layout.h"
#include "native/vector_math.h"

struct Acting {  // mirrors acting.py
    int64_t tokens, batch, width, heads, layers;
    double norm_eps, flow_eps, clamp;
    int64_t threads;
};

// ``flow_steps`` of cpu.cpp: the attention of each layer, and its state.
typedef void FlowSteps(const Layout*, const T* q, const T* k, const T* v, T* out, T* const* state, int64_t first);

namespace {

constexpr int64_t ROWS = 96;  // tokens that a thread takes at a time, at most
constexpr int STATES = 7;     // tensors of a layer's state

// Hands out a block's weights in the order in which acting.py puts them.
struct Weights {
    const T* next;
    const T* take(int64_t size) { return (next += size) - size; }
};

void layer_norm(const T* x, int64_t rows, int64_t width, T eps, const T* weight, const T* bias, T* to) {
    for (int64_t row = 0; row < rows; row++, x += width, to += width) {
        Vec sum{}, squares{};
        for (int64_t c = 0; c < width; c += LANES) sum += load(x + c);
        const T mean = total(sum) / width;
        for (int64_t c = 0; c < width; c += LANES) {
            const Vec centred = load(x + c) - mean;
            squares += centred * centred;
        }
        const T scale = 1 / std::sqrt(total(squares) / width + eps);
        for (int64_t c = 0; c < width; c += LANES)
            store(to + c, (load(x + c) - mean) * scale * load(weight + c) + load(bias + c));
    }
}

// to (rows, columns) = from (rows, terms) weight + bias. The weight (terms, columns) comes as panels, (terms, PANEL)
// each, which are read in order; acting.py makes them and defines PANEL.
void linear_layer(T* to, const T* from, int64_t rows, int64_t terms, int64_t columns, const T* weight,
                  const T* bias) {
    for (int64_t first = 0; first < columns; first += PANEL) {
        product(to + first, columns, rows, PANEL, from, terms, 1, weight + first * terms, PANEL, terms);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t c = first; c < first + PANEL; c += LANES) {
                T* at = to + row * columns + c;
                store(at, load(at) + load(bias + c));
            }
    }
}

void add_to(T* x, const T* more, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) store(x + i, load(x + i) + load(more + i));
}

}  // namespace

// x (tokens, batch, width) -> last (batch, width), the last tokens after all blocks; changes the states.
extern "C" void act(const Acting* acting, FlowSteps* flow_steps, const T* weights, T* const* states, const T* x,
                    T* last) {
    const Acting at = *acting;
    if (at.batch == 0) return;
    const int64_t width = at.width, head_dim = width / at.heads, most = at.threads * (ROWS / at.tokens);
    const int64_t slices = std::min(at.batch, at.threads * ((at.batch + most - 1) / most));
    const int64_t longest = (at.batch + slices - 1) / slices;
#pragma omp parallel num_threads(std::min(at.threads, slices))
    {
        Buffer buffer(10 * width * at.tokens * longest);
#pragma omp for schedule(static)
        for (int64_t slice = 0; slice < slices; slice++) {
            const int64_t begin = slice * at.batch / slices, slots = (slice + 1) * at.batch / slices - begin;
            int64_t rows = at.tokens * slots;
            buffer.restart();
            T *hidden = buffer.take(rows * width), *normed = buffer.take(rows * width),
              *qkv = buffer.take(3 * rows * width), *gathered = buffer.take(rows * width),
              *wide = buffer.take(4 * rows * width);
            for (int64_t t = 0; t < at.tokens; t++) {
                const T* from = x + (t * at.batch + begin) * width;
                std::copy(from, from + slots * width, hidden + t * slots * width);
            }
            Weights of{weights};
            for (int64_t layer = 0; layer < at.layers; layer++) {
                auto norm = [&] {
                    const T *weight = of.take(width), *bias = of.take(width);
                    layer_norm(hidden, rows, width, at.norm_eps, weight, bias, normed);
                };
                auto linear = [&](const T* from, int64_t inputs, int64_t outputs, T* to) {
                    const T *packed = of.take(inputs * outputs), *bias = of.take(outputs);
                    linear_layer(to, from, rows, inputs, outputs, packed, bias);
                };
                norm();
                linear(normed, width, 3 * width, qkv);
                const Layout where{slots, at.heads, at.tokens,
                                   3 * width, head_dim, slots * 3 * width,
                                   width, head_dim, slots * width,
                                   at.flow_eps, at.clamp, 1};
                flow_steps(&where, qkv, qkv + width, qkv + 2 * width, gathered, states + layer * STATES,
                           begin * at.heads);
                if (layer + 1 == at.layers) {  // only the last token is needed from here on
                    hidden += (rows - slots) * width;
                    gathered += (rows - slots) * width;
                    rows = slots;
                }
                linear(gathered, width, width, normed);
                add_to(hidden, normed, rows * width);
                norm();
                linear(normed, width, 4 * width, wide);
                for (int64_t i = 0; i < 4 * rows * width; i += LANES) {
                    const Vec value = load(wide + i);
                    store(wide + i, value < 0 ? Vec{} : value);  // NaN kept
                }
                linear(wide, 4 * width, width, normed);
                add_to(hidden, normed, rows * width);
            }
            std::copy(hidden, hidden + slots * width, last + begin * width);
        }
    }
}

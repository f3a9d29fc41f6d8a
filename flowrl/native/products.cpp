// The three matrix products of a linear layer, compiled on first use and called by products.py.
//
// Matrices are dense, rows first: x (rows, inputs), weight (outputs, inputs), gradient (rows, outputs). All
// sums are float32, each in an order that no number of threads changes.

#include "native/vector_math.h"

struct Sizes {  // mirrors products.py
    int64_t rows, inputs, outputs;  // inputs and outputs are multiples of the vectors' length
    int64_t threads;
};

namespace {

constexpr int64_t CHUNK = 96;  // rows that a thread takes at a time
// Of a weight's gradient: rows that are summed before the next are read, outputs that a thread takes at a time.
constexpr int64_t TERMS = 128, WIDEST = 528;

inline int64_t pieces(int64_t of, int64_t size) { return (of + size - 1) / size; }

// Chunks are whole tiles, smaller ones where there are few rows for so many threads.
inline int64_t chunk_of(int64_t rows, int64_t threads) {
    const int64_t share = pieces(pieces(rows, 2 * threads), TILE_ROWS) * TILE_ROWS;
    return std::min(CHUNK, share);
}

// to (rows, columns) = from (rows, terms) times a matrix that pack(first column, width) packs panel by panel into
// ``packed``, plus bias.
template <typename Pack>
void multiply(int64_t rows, int64_t terms, int64_t columns, int64_t threads, const T* from, const T* packed,
              const T* bias, T* to, Pack pack) {
    const int64_t chunk = chunk_of(rows, threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t p = 0; p < pieces(columns, PANEL); p++)
            pack(p * PANEL, std::min<int64_t>(PANEL, columns - p * PANEL));
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < rows; first += chunk)
            panel_product(to + first * columns, from + first * terms, std::min(chunk, rows - first), terms, columns,
                          packed, bias);
    }
}

}  // namespace

// outputs (rows, outputs) = x weight^T + bias, which may be null. packed is as large as weight.
extern "C" void linear_outputs(const Sizes* sizes, const T* x, const T* weight, const T* bias, T* packed, T* outputs) {
    const Sizes at = *sizes;
    multiply(at.rows, at.inputs, at.outputs, at.threads, x, packed, bias, outputs, [&](int64_t first, int64_t width) {
        pack_transposed(weight, at.inputs, first, width, packed);
    });
}

// g_x (rows, inputs) = gradient weight.
extern "C" void linear_input_gradient(const Sizes* sizes, const T* gradient, const T* weight, T* packed, T* g_x) {
    const Sizes at = *sizes;
    multiply(at.rows, at.outputs, at.inputs, at.threads, gradient, packed, nullptr, g_x,
             [&](int64_t first, int64_t width) {
                 for (int64_t t = 0; t < at.outputs; t++) {
                     const T* row = weight + t * at.inputs + first;
                     std::copy(row, row + width, packed + first * at.outputs + t * width);
                 }
             });
}

// g_weight (outputs, inputs) = gradient^T x.
extern "C" void linear_weight_gradient(const Sizes* sizes, const T* gradient, const T* x, T* g_weight) {
    const Sizes at = *sizes;
    // Threads share the longer side of g_weight: chunks of outputs, or stretches of panels of inputs.
    const int64_t panels = pieces(at.inputs, PANEL);
    const int64_t stretches = at.inputs > at.outputs ? std::min(at.threads, panels) : 1;
    const int64_t share = pieces(at.outputs, pieces(at.threads, stretches));
    const int64_t chunk = std::min(WIDEST, pieces(share, TILE_ROWS) * TILE_ROWS), chunks = pieces(at.outputs, chunk);
#pragma omp parallel num_threads(at.threads)
    {
        Buffer buffer(TERMS * PANEL);
        T* panel = buffer.take(TERMS * PANEL);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < chunks * stretches; task++) {
            const int64_t first = task / stretches * chunk, stretch = task % stretches;
            const int64_t begin = stretch * panels / stretches * PANEL;
            const int64_t end = std::min((stretch + 1) * panels / stretches * PANEL, at.inputs);
            for (int64_t row = 0; row < at.rows; row += TERMS)
                each_panel(end - begin, [&](int64_t from, int64_t width) {
                    const int64_t column = begin + from;
                    const int terms = std::min(TERMS, at.rows - row);
                    for (int t = 0; t < terms; t++) {
                        const T* of_row = x + (row + t) * at.inputs + column;
                        std::copy(of_row, of_row + width, panel + t * PANEL);
                    }
                    product(g_weight + first * at.inputs + column, at.inputs, std::min(chunk, at.outputs - first),
                            width, gradient + row * at.outputs + first, 1, at.outputs, panel, PANEL, terms, ALL, EVERY,
                            row > 0);
                });
        }
    }
}

// The three matrix products of a linear layer, compiled on first use and called by products.py.
//
// Matrices are dense, rows first: x (rows, inputs), weight (outputs, inputs), gradient (rows, outputs). All
// sums are float32, each in an order that no number of threads changes.

#include "vector_math.h"

struct Sizes {  // mirrors products.py
    int64_t rows, inputs, outputs;  // inputs and outputs are multiples of the vectors' length
    int64_t threads;
};

namespace {

constexpr int PANEL = TILE_VECTORS * LANES;  // columns of one operand that lie together while they are used
constexpr int64_t CHUNK = 96;                // rows that a thread takes at a time
// Of a weight's gradient: rows that are summed before the next are read, outputs that a thread takes at a time.
constexpr int64_t TERMS = 128, WIDEST = 528;

inline int64_t pieces(int64_t of, int64_t size) { return (of + size - 1) / size; }

// Chunks are whole tiles, smaller ones where there are few rows for so many threads.
inline int64_t chunk_of(int64_t rows, int64_t threads) {
    const int64_t share = pieces(pieces(rows, 2 * threads), TILE_ROWS) * TILE_ROWS;
    return std::min(CHUNK, share);
}

// to (rows, columns) = from (rows, terms) times what pack(first column, width, to) writes panel by panel, as
// (terms, width) where width is PANEL or, at the end, what is left; ``packed`` is (terms, columns) large.
template <typename Pack>
void multiply(int64_t rows, int64_t terms, int64_t columns, int64_t threads, const T* from, T* packed, T* to,
              const T* bias, Pack pack) {
    const int64_t panels = pieces(columns, PANEL), chunk = chunk_of(rows, threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t p = 0; p < panels; p++)
            pack(p * PANEL, std::min<int64_t>(PANEL, columns - p * PANEL), packed + p * PANEL * terms);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < rows; first += chunk) {
            const int height = std::min(chunk, rows - first);
            for (int64_t column = 0; column < columns; column += PANEL) {
                const int width = std::min<int64_t>(PANEL, columns - column);
                T* corner = to + first * columns + column;
                product(corner, columns, height, width, from + first * terms, terms, 1, packed + column * terms, width,
                        terms);
                if (!bias) continue;
                for (int r = 0; r < height; r++)
                    for (int c = 0; c < width; c += LANES) {
                        T* at = corner + r * columns + c;
                        store(at, load(at) + load(bias + column + c));
                    }
            }
        }
    }
}

}  // namespace

// outputs (rows, outputs) = x weight^T + bias, which may be null. packed is as large as weight.
extern "C" void linear_outputs(const Sizes* sizes, const T* x, const T* weight, const T* bias, T* packed, T* outputs) {
    const Sizes at = *sizes;
    multiply(at.rows, at.inputs, at.outputs, at.threads, x, packed, outputs, bias,
             [&](int64_t first, int64_t width, T* to) {
                 transpose(weight + first * at.inputs, at.inputs, width, at.inputs, to, width);
             });
}

// g_x (rows, inputs) = gradient weight.
extern "C" void linear_input_gradient(const Sizes* sizes, const T* gradient, const T* weight, T* packed, T* g_x) {
    const Sizes at = *sizes;
    multiply(at.rows, at.outputs, at.inputs, at.threads, gradient, packed, g_x, nullptr,
             [&](int64_t first, int64_t width, T* to) {
                 for (int64_t t = 0; t < at.outputs; t++) {
                     const T* row = weight + t * at.inputs + first;
                     std::copy(row, row + width, to + t * width);
                 }
             });
}

// g_weight (outputs, inputs) = gradient^T x.
extern "C" void linear_weight_gradient(const Sizes* sizes, const T* gradient, const T* x, T* g_weight) {
    const Sizes at = *sizes;
    const int64_t chunk = std::min(WIDEST, pieces(pieces(at.outputs, at.threads), TILE_ROWS) * TILE_ROWS);
#pragma omp parallel num_threads(at.threads)
    {
        Buffer buffer(TERMS * PANEL);
        T* panel = buffer.take(TERMS * PANEL);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < at.outputs; first += chunk)
            for (int64_t row = 0; row < at.rows; row += TERMS)
                for (int64_t column = 0; column < at.inputs; column += PANEL) {
                    const int terms = std::min(TERMS, at.rows - row);
                    const int width = std::min<int64_t>(PANEL, at.inputs - column);
                    for (int t = 0; t < terms; t++) {
                        const T* from = x + (row + t) * at.inputs + column;
                        std::copy(from, from + width, panel + t * PANEL);
                    }
                    product(g_weight + first * at.inputs + column, at.inputs, std::min(chunk, at.outputs - first),
                            width, gradient + row * at.outputs + first, 1, at.outputs, panel, PANEL, terms, ALL, EVERY,
                            row > 0);
                }
    }
}

// What stands between a model's matrix products, on CPUs: each function is one pass over (rows, width) numbers,
// where torch takes one for every operation. Called by pointwise.py, which says what each computes.
//
// Rows are worked on in parts of PART, each by one thread, so that no sum depends on the number of threads.

#include "native/vector_math.h"

struct Shape {  // mirrors pointwise.py
    int64_t rows, width;  // width is a multiple of two vectors
    uint64_t seed;        // of the components to drop
    int64_t dropped;      // of LEVELS; with 0, nothing is and the seed has no effect
    int64_t threads;
};

namespace {

constexpr int64_t PART = 64;
constexpr int LEVELS = 1 << 16;
constexpr int L = LANES;
static_assert(sizeof(T) == 4);

typedef uint64_t Words __attribute__((vector_size(BYTES)));

// What 2 * L components are multiplied with, those of index (a multiple of 2 * L) and after: 0 or ``scale``.
// The random numbers are a hash of seed and place (SplitMix64), 16 bits for each, so that the gradient finds
// the same ones again.
struct Factors { Vec first, second; };
inline Factors factors(const Shape& at, T scale, int64_t index) {
    Words z;
    for (int e = 0; e < BYTES / 8; e++) z[e] = e;
    z = (z + (uint64_t)index / 4) * 0x9E3779B97F4A7C15u + at.seed;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    const Integers bits = (Integers)(z ^ (z >> 31));
    const Integers low = bits & (LEVELS - 1), high = (bits >> 16) & (LEVELS - 1);
    const int dropped = at.dropped;
    return {low < dropped ? Vec{} : Vec{} + scale, high < dropped ? Vec{} : Vec{} + scale};
}
inline T scale_of(const Shape& at) { return T(LEVELS) / (LEVELS - at.dropped); }

// Calls body(row, column) for every 2 * L components of a part's rows.
template <typename Body> inline void each(const Shape& at, int64_t part, Body body) {
    const int64_t end = std::min((part + 1) * PART, at.rows);
    for (int64_t row = part * PART; row < end; row++)
        for (int64_t column = 0; column < at.width; column += 2 * L) body(row * at.width + column, column);
}
inline int64_t parts(const Shape& at) { return (at.rows + PART - 1) / PART; }

}  // namespace

// x = relu(x + bias), NaN kept.
extern "C" void add_bias_relu(const Shape* shape, T* x, const T* bias) {
    const Shape at = *shape;
#pragma omp parallel for num_threads(at.threads)
    for (int64_t part = 0; part < parts(at); part++)
        each(at, part, [&](int64_t index, int64_t column) {
            for (int half = 0; half < 2 * L; half += L) {
                const Vec sum = load(x + index + half) + load(bias + column + half);
                store(x + index + half, sum < 0 ? Vec{} : sum);
            }
        });
}

// g_x = gradient where outputs are not 0; sums (parts, width) of its rows.
extern "C" void relu_gradient(const Shape* shape, const T* gradient, const T* outputs, T* g_x, T* sums) {
    const Shape at = *shape;
#pragma omp parallel for num_threads(at.threads)
    for (int64_t part = 0; part < parts(at); part++) {
        T* sum = sums + part * at.width;
        std::fill(sum, sum + at.width, T(0));
        each(at, part, [&](int64_t index, int64_t column) {
            for (int half = 0; half < 2 * L; half += L) {
                const Vec g = load(outputs + index + half) <= 0 ? Vec{} : load(gradient + index + half);
                store(g_x + index + half, g);
                store(sum + column + half, load(sum + column + half) + g);
            }
        });
    }
}

// branch = x + dropout(branch + bias).
extern "C" void add_residual(const Shape* shape, const T* x, const T* bias, T* branch) {
    const Shape at = *shape;
    const T scale = scale_of(at);
#pragma omp parallel for num_threads(at.threads)
    for (int64_t part = 0; part < parts(at); part++)
        each(at, part, [&](int64_t index, int64_t column) {
            const Factors f = factors(at, scale, index);
            T* to = branch + index;
            store(to, load(x + index) + f.first * (load(to) + load(bias + column)));
            store(to + L, load(x + index + L) + f.second * (load(to + L) + load(bias + column + L)));
        });
}

// dropped = dropout(x); sums (parts, width) of its rows, unless null.
extern "C" void drop(const Shape* shape, const T* x, T* dropped, T* sums) {
    const Shape at = *shape;
    const T scale = scale_of(at);
#pragma omp parallel for num_threads(at.threads)
    for (int64_t part = 0; part < parts(at); part++) {
        T* sum = sums ? sums + part * at.width : nullptr;
        if (sum) std::fill(sum, sum + at.width, T(0));
        each(at, part, [&](int64_t index, int64_t column) {
            const Factors f = factors(at, scale, index);
            const Vec first = f.first * load(x + index), second = f.second * load(x + index + L);
            store(dropped + index, first);
            store(dropped + index + L, second);
            if (!sum) return;
            store(sum + column, load(sum + column) + first);
            store(sum + column + L, load(sum + column + L) + second);
        });
    }
}

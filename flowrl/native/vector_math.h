// Vectors of numbers, their exponential, and products of small matrices: what the C++ files are written with.
//
// Compiled for one number type, REAL. GCC's vector extensions keep it free of processors' own names.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, TILE_VECTORS = 4;  // of a vector register; vectors across a tile of a matrix product
#else
constexpr int BYTES = 32, TILE_VECTORS = 2;
#endif
constexpr int TILE_ROWS = 6;  // 6 rows of 4 vectors fill the 32 registers of AVX-512, of 2 the 16 of AVX2

typedef REAL T;
constexpr int LANES = BYTES / sizeof(T);

typedef T Vec __attribute__((vector_size(BYTES)));
typedef T Unaligned __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Integer;
typedef Integer Integers __attribute__((vector_size(BYTES)));

inline Vec load(const T* from) { return *(const Unaligned*)from; }
inline void store(T* to, Vec x) { *(Unaligned*)to = x; }

// Orders of a vector's elements, one row for each half = 1, 2, 4, ...: with the other half of every 2 * half
// elements; and for two vectors whose off-diagonal halves change places. Tables, since GCC would build each
// vector of indices anew, element by element.
struct Orders {
    Integer swapped[LANES][LANES], first[LANES][LANES], second[LANES][LANES];
};
constexpr Orders make_orders() {
    Orders orders{};
    for (int half = 1; half < LANES; half *= 2)
        for (int e = 0; e < LANES; e++) {
            orders.swapped[half][e] = e ^ half;
            orders.first[half][e] = e & half ? LANES + e - half : e;
            orders.second[half][e] = e & half ? LANES + e : e + half;
        }
    return orders;
}
alignas(64) constexpr Orders ORDERS = make_orders();
inline Integers order(const Integer* indices) {
    typedef Integer Aliased __attribute__((vector_size(BYTES), may_alias));
    return *(const Aliased*)indices;
}

inline T total(Vec x) {
#pragma GCC unroll 8
    for (int half = LANES / 2; half > 0; half /= 2) x += __builtin_shuffle(x, order(ORDERS.swapped[half]));
    return x[0];
}

// exp to about one unit in the last place; what is too large or small for a float saturates, NaN stays NaN.
template <typename V> inline V exponential(V x) {
    if constexpr (sizeof(T) == 4) {
        x = x > 87.0f ? V{} + 87.0f : x;
        x = x < -87.0f ? V{} - 87.0f : x;
        const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
        const V n = (x * 1.44269504f + magic) - magic;
        const V r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts
        V p = V{} + 1.9875691500e-4f;  // the remainder's series, fitted (Cephes)
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
        const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
        return p * (V)power;
    } else {
        for (int e = 0; e < LANES; e++) x[e] = std::exp(x[e]);
        return x;
    }
}

inline Vec sigmoid(Vec x) { return T(1) / (T(1) + exponential(-x)); }

// The same of ``count`` numbers; buffers hold whole vectors.
inline void sigmoids(const T* from, int count, T* to) {
    for (int t = 0; t < count; t += LANES) store(to + t, sigmoid(load(from + t)));
}

// Transpose a square of LANES x LANES: swap off-diagonal halves of 1, 2, 4, ... elements.
inline void transpose_tile(const T* from, int from_stride, T* to, int to_stride) {
    constexpr int L = LANES;
    Vec rows[L];
    for (int i = 0; i < L; i++) rows[i] = load(from + i * from_stride);
#pragma GCC unroll 8
    for (int half = 1; half < L; half *= 2) {
        const Integers first = order(ORDERS.first[half]), second = order(ORDERS.second[half]);
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) {
            if (i & half) continue;
            Vec a = rows[i], b = rows[i + half];
            rows[i] = __builtin_shuffle(a, b, first);
            rows[i + half] = __builtin_shuffle(a, b, second);
        }
    }
    for (int i = 0; i < L; i++) store(to + i * to_stride, rows[i]);
}

// (rows, columns) -> (columns, rows); both are rounded up to whole tiles, for which the buffers are large enough.
void transpose(const T* from, int from_stride, int rows, int columns, T* to, int to_stride) {
    for (int i = 0; i < rows; i += LANES)
        for (int j = 0; j < columns; j += LANES)
            transpose_tile(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
}

// Matrix products ------------------------------------------------------------------------------------------

enum Terms { ALL, UP_TO_ROW, FROM_ROW };  // which terms each row of a product sums: t <= row, t >= row
enum Columns { EVERY, UP_TO_DIAGONAL };   // which columns are wanted

// One tile: ROWS rows of VECTORS vectors of out (+)= sum over t of a[row, t] b[t].
template <int ROWS, int VECTORS>
inline void tile(T* out, int out_stride, const T* a, int a_row, int a_term, const T* b, int b_stride, int first,
                 int last, bool add) {
    Vec sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < VECTORS; w++)
            sums[r][w] = add ? load(out + r * out_stride + w * LANES) : Vec{};
    for (int t = first; t < last; t++) {
        Vec row[VECTORS];
        for (int w = 0; w < VECTORS; w++) row[w] = load(b + t * b_stride + w * LANES);
        for (int r = 0; r < ROWS; r++) {
            T factor = a[r * a_row + t * a_term];
            for (int w = 0; w < VECTORS; w++) sums[r][w] += factor * row[w];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < VECTORS; w++) store(out + r * out_stride + w * LANES, sums[r][w]);
}

template <int ROWS>
inline void strip(T* out, int out_stride, int columns, const T* a, int a_row, int a_term, const T* b, int b_stride,
                  int first, int last, bool add) {
    constexpr int L = LANES;
    int left = (columns + L - 1) / L;
    for (; left > 0; out += TILE_VECTORS * L, b += TILE_VECTORS * L, left -= TILE_VECTORS) {
        auto run = [&](auto vectors) {
            tile<ROWS, decltype(vectors)::value>(out, out_stride, a, a_row, a_term, b, b_stride, first, last, add);
        };
        if (left >= TILE_VECTORS) run(std::integral_constant<int, TILE_VECTORS>{});
        else if (left == 3) run(std::integral_constant<int, 3>{});
        else if (left == 2) run(std::integral_constant<int, 2>{});
        else run(std::integral_constant<int, 1>{});
    }
}

// out (+)= a b, row by row of ``rows``. Factors outside the wanted triangle must be zero within TILE_ROWS of it.
void product(T* out, int out_stride, int rows, int columns, const T* a, int a_row, int a_term, const T* b,
             int b_stride, int terms, Terms which = ALL, Columns wanted = EVERY, bool add = false) {
    for (int row = 0; row < rows;) {
        auto run = [&](auto height) {
            constexpr int ROWS = decltype(height)::value;
            int first = which == FROM_ROW ? row : 0;
            int last = which == UP_TO_ROW ? std::min(row + ROWS, terms) : terms;
            int wide = wanted == UP_TO_DIAGONAL ? std::min(row + ROWS, columns) : columns;
            strip<ROWS>(out + row * out_stride, out_stride, wide, a + row * a_row, a_row, a_term, b, b_stride,
                           first, last, add);
            row += ROWS;
        };
        if (rows - row >= TILE_ROWS) run(std::integral_constant<int, TILE_ROWS>{});
        else if (rows - row >= 4) run(std::integral_constant<int, 4>{});
        else if (rows - row >= 2) run(std::integral_constant<int, 2>{});
        else run(std::integral_constant<int, 1>{});
    }
}

// Zero what lies right of the diagonal, as far as a tile's rows make products read it.
void keep_lower(T* square, int stride, int rows) {
    for (int i = 0; i < rows; i++)
        for (int j = i + 1; j < std::min(i + TILE_ROWS, stride); j++) square[i * stride + j] = 0;
}

// A thread's memory, in whole cache lines, handed out in parts; the same parts again for every sequence, since
// fresh memory costs more than the arithmetic on it.
class Buffer {
    T *data, *next;

   public:
    explicit Buffer(size_t size) : data((T*)std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64)), next(data) {
        if (!data) std::abort();
        std::fill(data, data + size, T(0));
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(data); }
    void restart() { next = data; }
    T* take(size_t size) { return (next += size) - size; }
};

}  // namespace

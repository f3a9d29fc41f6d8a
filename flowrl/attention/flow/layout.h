#pragma once

#include <cstdint>

// Where tensors (batch, heads, length, width) lie, in elements; the last dimension is dense. Mirrors
// cpu.py.
struct Layout {
    int64_t batch, heads, length;
    int64_t in_batch, in_head, in_token;     // of queries, keys and values
    int64_t out_batch, out_head, out_token;  // of outputs and of all gradients
    double eps, clamp;
    int64_t threads;
};

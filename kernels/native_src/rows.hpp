// Row by row: LayerNorm, and activations to int8 with one scale a row. A row stays in the nearest cache.

#pragma once

#include <algorithm>
#include <cmath>

#include "parallel.hpp"
#include "vectors.hpp"

namespace tetra {

// t = x (+ residual, rounded to the format, kept in total);  t = gelu(t);  y = LayerNorm(t), or t without weight;
// then y goes to `out` in x's format, or to int8 codes with a scale a row.
struct Rows {
    const void* x;  // [m][x_stride], of which k count
    int32_t format;
    int64_t m, k, x_stride;
    const void* residual;  // null, or in the same format
    int64_t residual_stride;
    void* total;  // [m][k]
    bool gelu;
    const void* weight;  // null: no LayerNorm
    int32_t weight_format;
    const void* bias;
    int32_t bias_format;
    float eps;
    void* out;  // [m][k], or null
    int8_t* codes;  // [m][k]
    float* scale;   // [m]
};

constexpr int CHAINS = 4;                 // sums side by side, to hide the latency of an addition
constexpr int STRETCH = CHAINS * LANES;   // rows in the buffer are padded to a multiple of it

INLINE int64_t padded(int64_t k) { return (k + STRETCH - 1) / STRETCH * STRETCH; }

template <class Function> INLINE float sum_over(int64_t n, Function&& term) {
    Floats sums[CHAINS] = {};
    for (int64_t i = 0; i < n; i += STRETCH) {
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) sums[c] += term(i + c * LANES);
    }
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The largest |value|; NaN or infinity if there is one, since as whole numbers their bits are the largest.
template <class Function> INLINE float largest_magnitude(int64_t n, Function&& value) {
    Ints best[CHAINS] = {};
    for (int64_t i = 0; i < n; i += STRETCH) {
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) best[c] = largest(best[c], bits<Ints>(value(i + c * LANES)) & 0x7fffffff);
    }
    return bits<float>(largest_of(largest(largest(best[0], best[1]), largest(best[2], best[3]))));
}

// Codes of one row; x ~= code * scale, rounding half to even.
template <class Function> INLINE float quantize_row(int64_t k, float magnitude, int8_t* codes, Function&& value) {
    if (magnitude < 1e-5f) magnitude = 1e-5f;
    const Floats factor = splat(127.0f / magnitude);
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) store(codes + i, round_to_bytes(value(i) * factor));
    if (i < k) {
        const Bytes last = round_to_bytes(value(i) * factor);
        std::memcpy(codes + i, &last, k - i);
    }
    return magnitude / 127.0f;
}

// Mean of a row in the buffer and 1 / sqrt(variance + eps); from k on the buffer is filled with the mean.
struct Moments {
    float mean, factor;
};

INLINE Moments moments_of(float* buffer, int64_t k, float eps) {
    const int64_t n = padded(k);
    const auto value = [&](int64_t i) { return load<Floats>(buffer + i); };
    const float mean = sum_over(n, value) / static_cast<float>(k);
    std::fill(buffer + k, buffer + n, mean);
    const float variance = sum_over(n, [&](int64_t i) { return (value(i) - mean) * (value(i) - mean); });
    return {mean, 1.0f / std::sqrt(variance / static_cast<float>(k) + eps)};
}

// LayerNorm of a row in the buffer, which is 0 from k on, as weight and bias are; returns its largest magnitude.
INLINE float normalize_row(float* buffer, int64_t k, float eps, const float* weight, const float* bias) {
    const Moments moments = moments_of(buffer, k, eps);
    return largest_magnitude(padded(k), [&](int64_t i) {
        const Floats centred = (load<Floats>(buffer + i) - moments.mean) * moments.factor;
        const Floats y = centred * load<Floats>(weight + i) + load<Floats>(bias + i);
        store(buffer + i, y);
        return y;
    });
}

template <class X> void run_row(const Rows& rows, int64_t row, float* buffer, const float* weight, const float* bias) {
    typedef typename X::Element Element;
    const int64_t k = rows.k, n = padded(k);
    const Element* x = static_cast<const Element*>(rows.x) + row * rows.x_stride;
    const Element* residual = static_cast<const Element*>(rows.residual) + row * rows.residual_stride;
    Element* total = static_cast<Element*>(rows.total) + row * k;
    for (int64_t i = 0; i < k; i += LANES) {
        Floats t = load_first<X>(x + i, k - i);
        if (rows.residual) {
            t = t + load_first<X>(residual + i, k - i);
            store_first<X>(total + i, t, k - i);
            t = X::round(t);
        }
        if (rows.gelu) t = gelu_of(t);
        store(buffer + i, t);
    }
    std::fill(buffer + k, buffer + n, 0.0f);
    const auto value = [&](int64_t i) { return load<Floats>(buffer + i); };
    const float magnitude = rows.weight  ? normalize_row(buffer, k, rows.eps, weight, bias)
                            : rows.codes ? largest_magnitude(n, value)
                                         : 0.0f;
    if (rows.out) {
        Element* out = static_cast<Element*>(rows.out) + row * k;
        for (int64_t i = 0; i < k; i += LANES) store_first<X>(out + i, value(i), k - i);
    } else {
        rows.scale[row] = quantize_row(k, magnitude, rows.codes + row * k, value);
    }
}

inline void run(const Rows& rows, int64_t rows_a_task, int64_t threads) {
    const int64_t n = padded(rows.k);
    // LayerNorm's parameters once for all rows; zero past the end, so that padding gives zero.
    thread_local Scratch parameters;
    float* weight = parameters.get<float>(2 * n);
    float* bias = weight + n;
    std::fill_n(weight, 2 * n, 0.0f);
    if (rows.weight) to_floats(rows.weight, rows.weight_format, 0, rows.k, weight);
    if (rows.bias) to_floats(rows.bias, rows.bias_format, 0, rows.k, bias);
    parallel_for((rows.m + rows_a_task - 1) / rows_a_task, threads, [&](int64_t task) {
        thread_local Scratch memory;
        float* buffer = memory.get<float>(n);
        with_type(rows.format, [&](auto type) {
            for (int64_t row = task * rows_a_task; row < std::min(rows.m, (task + 1) * rows_a_task); row++) {
                run_row<decltype(type)>(rows, row, buffer, weight, bias);
            }
        });
    });
}

}  // namespace tetra

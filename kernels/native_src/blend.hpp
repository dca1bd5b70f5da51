// The operands of a linear layer that trains towards ternary weights and int8 activations, and the gradient of the
// rows. Formulas are those of tetra/kernels/blended_linear.py, the bits of the dropout those of dropout.py.

#pragma once

#include <algorithm>
#include <cmath>

#include "parallel.hpp"
#include "rows.hpp"
#include "vectors.hpp"

namespace tetra {

template <class Word> INLINE Word mix(Word x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

INLINE Words lane_numbers() {
    Words numbers;
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

// The values that a hash of seed, row and column keeps.
class Dropout {
  public:
    Dropout(double p, int64_t seed)
        : threshold_(static_cast<uint32_t>(std::min(std::nearbyint(p * 0x1p32), 4294967295.0))),
          keep_scale_(static_cast<float>(0x1p32 / (0x1p32 - threshold_))),
          state_(mix(mix(static_cast<uint32_t>(seed) ^ 0x9e3779b9u) ^ static_cast<uint32_t>(seed >> 32))) {}

    INLINE bool any() const { return threshold_ != 0; }
    INLINE uint32_t state_of(int64_t row) const { return mix(state_ ^ static_cast<uint32_t>(row)); }
    // What values are multiplied by.
    INLINE Floats factors(uint32_t state_of_row, Words columns) const {
        return mix(columns ^ state_of_row) >= threshold_ ? splat(keep_scale_) : Floats{};
    }

  private:
    uint32_t threshold_;
    float keep_scale_;
    uint32_t state_;
};

// v = LayerNorm(dropout(gelu(x))), each where there is one.
struct Activation {
    const void* x;  // [m][k]
    int32_t format;
    int64_t m, k;
    bool gelu;
    Dropout dropout;
    const void* weight;  // null: no LayerNorm
    int32_t weight_format;
    const void* bias;
    int32_t bias_format;
    float eps;
};

// out = v + lambda (Q(v) - v) = lambda Q(v) + (1 - lambda) v, [m][k].
struct BlendRows {
    Activation activation;
    float lambda;
    void* out;
    int32_t out_format;
};

// From the gradient of v, which is that of out, [m][k].
struct BlendRowsBackward {
    Activation activation;
    const void* grad;
    int32_t grad_format;
    void* grad_x;       // [m][k], in x's format
    float* grad_weight;  // [k]; not written without LayerNorm
    float* grad_bias;    // [k]
    float lambda;
    void* out;  // what BlendRows gives, once more, in grad's format; null: not wanted
};

// out = W + lambda (Q(W) - W), n values; Q is ternary.
struct BlendWeight {
    const void* weight;
    int32_t format;
    int64_t n;
    float lambda;
    void* out;
    int32_t out_format;
};

// One row of t = dropout(gelu(x)), zero from k on, and with SLOPE dt/dx.
template <class X, bool SLOPE> INLINE void activate_row(const Activation& rows, int64_t row, float* t, float* slope) {
    const int64_t k = rows.k;
    const typename X::Element* x = static_cast<const typename X::Element*>(rows.x) + row * k;
    const uint32_t state = rows.dropout.state_of(row);
    Words columns = lane_numbers();
    for (int64_t i = 0; i < k; i += LANES, columns += LANES) {
        Floats value = load_first<X>(x + i, k - i), factor = splat(1.0f);
        if (rows.gelu) value = SLOPE ? gelu_of(value, &factor) : gelu_of(value);
        if (rows.dropout.any()) {
            const Floats keep = rows.dropout.factors(state, columns);
            value *= keep;
            factor *= keep;
        }
        store(t + i, value);
        if (SLOPE) store(slope + i, factor);
    }
    std::fill(t + k, t + padded(k), 0.0f);
    if (SLOPE) std::fill(slope + k, slope + padded(k), 0.0f);
}

// v + lambda (Q(v) - v) of a row whose largest magnitude is known.
template <class Y>
INLINE void write_blend(const float* v, int64_t k, float magnitude, float lambda, typename Y::Element* out) {
    const auto value = [&](int64_t i) { return load<Floats>(v + i); };
    if (lambda == 0.0f) {
        for (int64_t i = 0; i < k; i += LANES) store_first<Y>(out + i, value(i), k - i);
        return;
    }
    if (magnitude < 1e-5f) magnitude = 1e-5f;
    const float factor = 127.0f / magnitude, scale = magnitude / 127.0f * lambda, rest = 1.0f - lambda;
    for (int64_t i = 0; i < k; i += LANES) {
        store_first<Y>(out + i, round_to_even(value(i) * factor) * scale + value(i) * rest, k - i);
    }
}

template <class X, class Y> void blend_row(const BlendRows& task, int64_t row, float* v, const float* parameters) {
    const Activation& rows = task.activation;
    const int64_t k = rows.k, n = padded(k);
    activate_row<X, false>(rows, row, v, nullptr);
    const float magnitude = rows.weight ? normalize_row(v, k, rows.eps, parameters, parameters + n)
                                        : largest_magnitude(n, [&](int64_t i) { return load<Floats>(v + i); });
    write_blend<Y>(v, k, magnitude, task.lambda, static_cast<typename Y::Element*>(task.out) + row * k);
}

// LayerNorm's parameters [2][padded(k)], once for all rows; zero past the end, so that padding gives zero.
inline float* parameters_of(const Activation& rows) {
    thread_local Scratch memory;
    const int64_t n = padded(rows.k);
    float* parameters = memory.get<float>(2 * n);
    std::fill_n(parameters, 2 * n, 0.0f);
    if (rows.weight) to_floats(rows.weight, rows.weight_format, 0, rows.k, parameters);
    if (rows.bias) to_floats(rows.bias, rows.bias_format, 0, rows.k, parameters + n);
    return parameters;
}

constexpr int64_t ROWS_A_TASK = 8;
constexpr int64_t VALUES_A_THREAD = 1 << 14;  // fewer are done before another thread has woken up

INLINE int64_t useful_threads(int64_t threads, int64_t n_values) {
    return std::min(threads, n_values / VALUES_A_THREAD + 1);
}

inline void run(const BlendRows& task, int64_t threads) {
    const Activation& rows = task.activation;
    const float* parameters = parameters_of(rows);
    parallel_for((rows.m + ROWS_A_TASK - 1) / ROWS_A_TASK, useful_threads(threads, rows.m * rows.k), [&](int64_t i) {
        thread_local Scratch memory;
        float* v = memory.get<float>(padded(rows.k));
        with_type(rows.format, [&](auto x) {
            with_type(task.out_format, [&](auto y) {
                for (int64_t row = i * ROWS_A_TASK; row < std::min(rows.m, (i + 1) * ROWS_A_TASK); row++) {
                    blend_row<decltype(x), decltype(y)>(task, row, v, parameters);
                }
            });
        });
    });
}

// One row of the gradient; with LayerNorm its terms are added to the sums grad_weight and grad_bias [padded(k)].
//     dL/dt = (g - mean g - h mean(g h)) / sqrt(var t + eps),  h = (t - mean t) / sqrt(var t + eps),  g = weight dL/dv
template <class X, class G>
void backward_row(const BlendRowsBackward& task, int64_t row, float* buffers, const float* weight, float* grad_weight,
                  float* grad_bias) {
    const Activation& rows = task.activation;
    const int64_t k = rows.k, n = padded(k);
    const typename G::Element* grad = static_cast<const typename G::Element*>(task.grad) + row * k;
    typename X::Element* grad_x = static_cast<typename X::Element*>(task.grad_x) + row * k;
    typename G::Element* out = static_cast<typename G::Element*>(task.out) + row * k;
    float *t = buffers, *slope = buffers + n, *g = buffers + 2 * n, *v = buffers + 3 * n;
    activate_row<X, true>(rows, row, t, slope);
    if (!rows.weight) {
        if (task.out) {
            const float magnitude = largest_magnitude(n, [&](int64_t i) { return load<Floats>(t + i); });
            write_blend<G>(t, k, magnitude, task.lambda, out);
        }
        for (int64_t i = 0; i < k; i += LANES) {
            store_first<X>(grad_x + i, load_first<G>(grad + i, k - i) * load<Floats>(slope + i), k - i);
        }
        return;
    }
    const Moments moments = moments_of(t, k, rows.eps);
    const float* bias = weight + n;
    Floats g_sum = {}, product_sum = {};
    Ints best = {};
    for (int64_t i = 0; i < k; i += LANES) {
        const Floats upstream = load_first<G>(grad + i, k - i);
        const Floats h = (load<Floats>(t + i) - moments.mean) * moments.factor;
        const Floats scaled = upstream * load<Floats>(weight + i);
        store(grad_bias + i, load<Floats>(grad_bias + i) + upstream);
        store(grad_weight + i, load<Floats>(grad_weight + i) + upstream * h);
        store(t + i, h);
        store(g + i, scaled);
        if (task.out) {
            const Floats y = h * load<Floats>(weight + i) + load<Floats>(bias + i);
            store(v + i, y);
            best = largest(best, bits<Ints>(y) & 0x7fffffff);
        }
        g_sum += scaled;
        product_sum += scaled * h;
    }
    if (task.out) write_blend<G>(v, k, bits<float>(largest_of(best)), task.lambda, out);
    const float g_mean = sum_of(g_sum) / static_cast<float>(k), slant = sum_of(product_sum) / static_cast<float>(k);
    for (int64_t i = 0; i < k; i += LANES) {
        const Floats grad_t = (load<Floats>(g + i) - g_mean - load<Floats>(t + i) * slant) * moments.factor;
        store_first<X>(grad_x + i, grad_t * load<Floats>(slope + i), k - i);
    }
}

constexpr int64_t MOST_PARTS = 64;

inline void run(const BlendRowsBackward& task, int64_t threads) {
    const Activation& rows = task.activation;
    const int64_t n = padded(rows.k);
    // Parts of the rows, the same whatever the threads: so are the sums, which every part has for itself.
    const int64_t height = std::max((rows.m + MOST_PARTS - 1) / MOST_PARTS, ROWS_A_TASK);
    const int64_t n_parts = (rows.m + height - 1) / height;
    const float* weight = parameters_of(rows);
    thread_local Scratch sum_memory;
    float* sums = rows.weight ? sum_memory.get<float>(std::max<int64_t>(n_parts, 1) * 2 * n) : nullptr;
    parallel_for(n_parts, useful_threads(threads, rows.m * rows.k), [&](int64_t part) {
        thread_local Scratch memory;
        float* buffers = memory.get<float>(4 * n);
        float *grad_weight = nullptr, *grad_bias = nullptr;
        if (rows.weight) {
            grad_weight = sums + part * 2 * n, grad_bias = grad_weight + n;
            std::fill_n(grad_weight, 2 * n, 0.0f);
        }
        with_type(rows.format, [&](auto x) {
            with_type(task.grad_format, [&](auto grad) {
                for (int64_t row = part * height; row < std::min(rows.m, (part + 1) * height); row++) {
                    backward_row<decltype(x), decltype(grad)>(task, row, buffers, weight, grad_weight, grad_bias);
                }
            });
        });
    });
    if (!rows.weight) return;
    for (int64_t i = 0; i < rows.k; i += LANES) {
        Floats weight_sum = {}, bias_sum = {};
        for (int64_t part = 0; part < n_parts; part++) {
            weight_sum += load<Floats>(sums + part * 2 * n + i);
            bias_sum += load<Floats>(sums + part * 2 * n + n + i);
        }
        store_first<Float32>(task.grad_weight + i, weight_sum, rows.k - i);
        store_first<Float32>(task.grad_bias + i, bias_sum, rows.k - i);
    }
}

constexpr int64_t VALUES_A_TASK = 1 << 13;

inline void run(const BlendWeight& task, int64_t threads) {
    const int64_t n_tasks = (task.n + VALUES_A_TASK - 1) / VALUES_A_TASK;
    threads = useful_threads(threads, task.n);
    float scale = 1.0f;
    if (task.lambda != 0.0f) {
        // |W| of every part on its own, then all in order: the same whatever the threads.
        thread_local Scratch memory;
        double* sums = memory.get<double>(std::max<int64_t>(n_tasks, 1));
        parallel_for(n_tasks, threads, [&](int64_t part) {
            const int64_t first = part * VALUES_A_TASK, count = std::min(task.n - first, VALUES_A_TASK);
            with_type(task.format, [&](auto type) {
                using W = decltype(type);
                const auto* from = static_cast<const typename W::Element*>(task.weight) + first;
                sums[part] = sum_over(padded(count), [&](int64_t i) {
                    return i < count ? magnitude_of(load_first<W>(from + i, count - i)) : Floats{};
                });
            });
        });
        double total = 0.0;
        for (int64_t part = 0; part < n_tasks; part++) total += sums[part];
        scale = static_cast<float>(total / static_cast<double>(task.n));
        if (scale < 1e-5f) scale = 1e-5f;
    }
    const float inverse = 1.0f / scale, rest = 1.0f - task.lambda;
    parallel_for(n_tasks, threads, [&](int64_t part) {
        const int64_t first = part * VALUES_A_TASK, count = std::min(task.n - first, VALUES_A_TASK);
        with_type(task.format, [&](auto type) {
            with_type(task.out_format, [&](auto out_type) {
                using W = decltype(type);
                using Y = decltype(out_type);
                const auto* from = static_cast<const typename W::Element*>(task.weight) + first;
                auto* out = static_cast<typename Y::Element*>(task.out) + first;
                for (int64_t i = 0; i < count; i += LANES) {
                    const Floats w = load_first<W>(from + i, count - i);
                    // Clipped before it is rounded, which comes to the same, and NaN stays.
                    const Floats ternary = round_to_even(-largest(splat(-1.0f), -largest(splat(-1.0f), w * inverse)));
                    store_first<Y>(out + i, ternary * (scale * task.lambda) + w * rest, count - i);
                }
            });
        });
    });
}

}  // namespace tetra

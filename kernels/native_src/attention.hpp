// Softmax attention on the output of a joint projection: columns are (query, key, value) x head x dim.
//
// For TILE_M queries at a time all logits are computed, turned into weights and multiplied with the values; with
// a few hundred to some thousand tokens they stay in the second-level cache, so that nothing need be rescaled on
// the way. Products run on bfloat16 pairs where the machine multiplies them, else in float32.

#pragma once

#include <algorithm>
#include <limits>

#include "parallel.hpp"
#include "vectors.hpp"

namespace tetra {

// [batch][tokens][3 * heads * dim], rows and images at strides; out [batch][tokens][heads * dim].
struct Attention {
    const void* qkv;
    int32_t format;
    int64_t batch, tokens, heads, dim, batch_stride, token_stride;
    float scale;  // softmax weights are 2^(scale q.k), normalised
    void* out;
};

// `Arithmetic`: an Item holds STEP neighbours along the summed dimension.

struct FloatItems {
    typedef float Item;
    static constexpr int STEP = 1;
    static INLINE Floats add_product(Floats sum, Floats b, Item a) { return sum + b * a; }
    // Items of LANES values.
    static INLINE void store_items(Item* to, Floats v) { store(to, v); }
    // Values of two rows, a step after another, side by side: just the first.
    static INLINE Floats interleave(Floats first, Floats) { return first; }
};

#if TETRA_AVX512 && defined(__AVX512BF16__)
struct PairItems {
    typedef uint32_t Item;  // two bfloat16, the first in the low half
    static constexpr int STEP = 2;
    static INLINE Floats add_product(Floats sum, Floats b, Item a) {
        return _mm512_dpbf16_ps(sum, bits<__m512bh>(b), bits<__m512bh>(Words{} + a));
    }
    static INLINE void store_items(Item* to, Floats v) { store(to, BFloat16::convert(v)); }
    static INLINE Floats interleave(Floats first, Floats second) {
        return bits<Floats>((bits<Words>(first) >> 16) | bits<Words>(second));  // both exact in bfloat16
    }
};
#endif

constexpr int ATTENTION_N = 2 * LANES;
constexpr int ATTENTION_M = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;

// out[ROWS][ATTENTION_N] = a[ROWS][n_items] times the panel [n_items][ATTENTION_N].
template <class Arithmetic, int ROWS>
void float_tile(const typename Arithmetic::Item* a, int64_t a_stride, const typename Arithmetic::Item* panel,
                int64_t n_items, float* out, int64_t out_stride) {
    Floats sums[ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = Floats{};
    for (int64_t item = 0; item < n_items; item++) {
        const Floats first = load<Floats>(panel + item * ATTENTION_N);
        const Floats second = load<Floats>(panel + item * ATTENTION_N + LANES);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            const typename Arithmetic::Item value = a[row * a_stride + item];
            sums[row][0] = Arithmetic::add_product(sums[row][0], first, value);
            sums[row][1] = Arithmetic::add_product(sums[row][1], second, value);
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) {
        store(out + row * out_stride, sums[row][0]);
        store(out + row * out_stride + LANES, sums[row][1]);
    }
}

// logits[n] (n a multiple of LANES) to items of softmax weights; returns the factor that normalises them.
template <class Arithmetic>
float softmax_row(const float* logits, int64_t n, float scale, typename Arithmetic::Item* items) {
    Floats best = splat(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < n; i += LANES) best = largest(best, load<Floats>(logits + i));
    const Floats offset = splat(largest_of(best) * scale);
    Floats sum = {};
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats weight = exp2_of(load<Floats>(logits + i) * scale - offset);
        sum += weight;
        Arithmetic::store_items(items + i / Arithmetic::STEP, weight);
    }
    return 1.0f / sum_of(sum);
}

// One head's matrix: rows of `dim` values, `stride` apart. Rows past the last are zero.
template <class Type> struct HeadRows {
    const typename Type::Element* first;
    int64_t n_rows, dim, stride;

    INLINE Floats at(int64_t row, int64_t d) const {
        return row < n_rows && d < dim ? load_first<Type>(first + row * stride + d, dim - d) : Floats{};
    }
    // The rows lie pages apart, where the hardware does not look ahead.
    INLINE void prefetch(int64_t row) const {
        if (row >= n_rows) return;
        const char* from = reinterpret_cast<const char*>(first + row * stride);
        for (int64_t i = 0; i < dim * bytes_of_element; i += 64) __builtin_prefetch(from + i);
    }
    static constexpr int64_t bytes_of_element = sizeof(typename Type::Element);
};

constexpr int ROWS_AHEAD = 12;

// The items of one row; `to` has room for whole vectors.
template <class Type, class Arithmetic>
INLINE void pack_row(const HeadRows<Type>& rows, int64_t row, typename Arithmetic::Item* to) {
    rows.prefetch(row + ROWS_AHEAD);
    for (int64_t d = 0; d < rows.dim; d += LANES) Arithmetic::store_items(to + d / Arithmetic::STEP, rows.at(row, d));
}

// Panels [tile of ATTENTION_N keys][item along dim][key].
template <class Type, class Arithmetic>
void pack_keys(const HeadRows<Type>& keys, int64_t n_tiles, int64_t n_items, int64_t row_stride,
               typename Arithmetic::Item* staged, typename Arithmetic::Item* to) {
    for (int64_t tile = 0; tile < n_tiles; tile++) {
        for (int64_t key = 0; key < ATTENTION_N; key++) {
            pack_row<Type, Arithmetic>(keys, tile * ATTENTION_N + key, staged + key * row_stride);
        }
        for (int64_t item = 0; item < n_items; item++) {
            for (int64_t key = 0; key < ATTENTION_N; key++) *to++ = staged[key * row_stride + item];
        }
    }
}

// Panels [tile of ATTENTION_N dims][item along keys][dim].
template <class Type, class Arithmetic>
void pack_values(const HeadRows<Type>& values, int64_t n_tiles, int64_t n_items, typename Arithmetic::Item* to) {
    for (int64_t item = 0; item < n_items; item++) {
        const int64_t row = item * Arithmetic::STEP;
        for (int64_t i = 0; i < Arithmetic::STEP; i++) values.prefetch(row + i + ROWS_AHEAD);
        for (int64_t tile = 0; tile < n_tiles; tile++) {
            for (int64_t lane = 0; lane < ATTENTION_N; lane += LANES) {
                const int64_t d = tile * ATTENTION_N + lane;
                store(to + (tile * n_items + item) * ATTENTION_N + lane,
                      Arithmetic::interleave(values.at(row, d), values.at(row + 1, d)));
            }
        }
    }
}

template <class Type, class Arithmetic>
void attend(const Attention& task, int64_t image, int64_t head, int64_t first_row, int64_t last_row) {
    typedef typename Arithmetic::Item Item;
    typedef typename Type::Element Element;
    constexpr int STEP = Arithmetic::STEP, N = ATTENTION_N, M = ATTENTION_M;
    const int64_t tokens = task.tokens, dim = task.dim, width = task.heads * dim;
    const int64_t key_tiles = (tokens + N - 1) / N, value_tiles = (dim + N - 1) / N;
    const int64_t padded_tokens = key_tiles * N, padded_dim = value_tiles * N;
    const int64_t dim_items = (dim + STEP - 1) / STEP, token_items = padded_tokens / STEP;
    const int64_t row_items = padded_dim / STEP;
    const Element* first = static_cast<const Element*>(task.qkv) + image * task.batch_stride + head * dim;
    const HeadRows<Type> query_rows{first, tokens, dim, task.token_stride};
    const HeadRows<Type> key_rows{first + width, tokens, dim, task.token_stride};
    const HeadRows<Type> value_rows{first + 2 * width, tokens, dim, task.token_stride};

    thread_local Scratch key_memory, value_memory, query_memory, logit_memory, weight_memory, out_memory;
    Item* keys = key_memory.get<Item>(padded_tokens * dim_items);
    Item* values = value_memory.get<Item>(padded_dim * token_items);
    Item* queries = query_memory.get<Item>(std::max(M, N) * row_items);
    float* logits = logit_memory.get<float>(M * padded_tokens);
    Item* weights = weight_memory.get<Item>(M * token_items);
    float* out = out_memory.get<float>(M * padded_dim);
    pack_keys<Type, Arithmetic>(key_rows, key_tiles, dim_items, row_items, queries, keys);
    pack_values<Type, Arithmetic>(value_rows, value_tiles, token_items, values);
    for (int64_t row = first_row; row < last_row; row += M) {
        const int64_t n_rows = std::min<int64_t>(M, last_row - row);
        for (int64_t i = 0; i < M; i++) pack_row<Type, Arithmetic>(query_rows, row + i, queries + i * row_items);
        for (int64_t tile = 0; tile < key_tiles; tile++) {
            float_tile<Arithmetic, M>(queries, row_items, keys + tile * dim_items * N, dim_items, logits + tile * N,
                                      padded_tokens);
        }
        float factors[M];
        for (int64_t i = 0; i < M; i++) {
            float* logit_row = logits + i * padded_tokens;
            std::fill(logit_row + tokens, logit_row + padded_tokens, -std::numeric_limits<float>::infinity());
            factors[i] = softmax_row<Arithmetic>(logit_row, padded_tokens, task.scale, weights + i * token_items);
        }
        for (int64_t tile = 0; tile < value_tiles; tile++) {
            float_tile<Arithmetic, M>(weights, token_items, values + tile * token_items * N, token_items,
                                      out + tile * N, padded_dim);
        }
        for (int64_t i = 0; i < n_rows; i++) {
            Element* to = static_cast<Element*>(task.out) + (image * tokens + row + i) * width + head * dim;
            for (int64_t d = 0; d < dim; d += LANES) {
                store_first<Type>(to + d, load<Floats>(out + i * padded_dim + d) * factors[i], dim - d);
            }
        }
    }
}

inline void run(const Attention& task, int64_t threads) {
    // A head is a task; with few heads for the threads its queries are divided, and each part packs the keys anew.
    const int64_t n_heads = task.batch * task.heads;
    if (n_heads == 0 || task.tokens == 0 || task.dim == 0) return;
    const int64_t n_tiles = (task.tokens + ATTENTION_M - 1) / ATTENTION_M;
    const int64_t n_parts = std::min((4 * threads + n_heads - 1) / n_heads, (n_tiles + 3) / 4);
    parallel_for(n_heads * n_parts, threads, [&](int64_t item) {
        const int64_t image = item / n_parts / task.heads, head = item / n_parts % task.heads, part = item % n_parts;
        const int64_t first = part * n_tiles / n_parts * ATTENTION_M;
        const int64_t last = std::min((part + 1) * n_tiles / n_parts * ATTENTION_M, task.tokens);
#if TETRA_AVX512 && defined(__AVX512BF16__)
        if (task.format == BFLOAT16) return attend<BFloat16, PairItems>(task, image, head, first, last);
#endif
        with_type(task.format, [&](auto type) { attend<decltype(type), FloatItems>(task, image, head, first, last); });
    });
}

// Softmax of logits [m][n], in place: 2^(scale x), normalised.
struct Softmax {
    void* x;
    int32_t format;
    int64_t m, n;
    float scale;
};

template <class X> void softmax_in_place(typename X::Element* x, int64_t n, float scale, float* buffer) {
    Floats best = splat(-1e30f), sum = {};
    for (int64_t i = 0; i < n; i += LANES) {
        store(buffer + i, load_first<X>(x + i, n - i));
        if (n - i < LANES) std::fill(buffer + n, buffer + i + LANES, -1e30f);
        best = largest(best, load<Floats>(buffer + i));
    }
    const Floats offset = splat(largest_of(best) * scale);
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats weight = exp2_of(load<Floats>(buffer + i) * scale - offset);
        sum += weight;
        store(buffer + i, weight);
    }
    const float factor = 1.0f / sum_of(sum);
    for (int64_t i = 0; i < n; i += LANES) store_first<X>(x + i, load<Floats>(buffer + i) * factor, n - i);
}

inline void run(const Softmax& task, int64_t threads) {
    constexpr int64_t rows_a_task = 64;
    parallel_for((task.m + rows_a_task - 1) / rows_a_task, threads, [&](int64_t i) {
        thread_local Scratch memory;
        float* buffer = memory.get<float>(task.n + LANES);
        with_type(task.format, [&](auto type) {
            using X = decltype(type);
            auto* x = static_cast<typename X::Element*>(task.x);
            for (int64_t row = i * rows_a_task; row < std::min(task.m, (i + 1) * rows_a_task); row++) {
                softmax_in_place<X>(x + row * task.n, task.n, task.scale, buffer);
            }
        });
    });
}

}  // namespace tetra

// Softmax attention on the output of a joint projection: columns are (query, key, value) x head x dim.
//
// For TILE_M queries at a time all logits are computed, turned into weights and multiplied with the values; with
// a few hundred to some thousand tokens they stay in the second-level cache, so that nothing need be rescaled on
// the way. The backward pass makes them again. Products run on bfloat16 pairs where the machine multiplies them, else in float32.

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
    // To what an item can hold.
    static INLINE Floats round(Floats v) { return v; }
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
    static INLINE Floats round(Floats v) { return BFloat16::round(v); }
};
#endif

constexpr int ATTENTION_N = 2 * LANES;
constexpr int ATTENTION_M = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;

// out[ROWS][ATTENTION_N] = (ADD: +=) a[ROWS][n_items] times the panel [n_items][ATTENTION_N].
template <class Arithmetic, int ROWS, bool ADD = false>
void float_tile(const typename Arithmetic::Item* a, int64_t row_stride, int64_t item_stride,
                const typename Arithmetic::Item* panel, int64_t n_items, float* out, int64_t out_stride) {
    Floats sums[ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) {
        for (int i = 0; i < 2; i++) {
            sums[row][i] = ADD ? load<Floats>(out + row * out_stride + i * LANES) : Floats{};
        }
    }
    for (int64_t item = 0; item < n_items; item++) {
        const Floats first = load<Floats>(panel + item * ATTENTION_N);
        const Floats second = load<Floats>(panel + item * ATTENTION_N + LANES);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            const typename Arithmetic::Item value = a[row * row_stride + item * item_stride];
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

// Panels [tile of ATTENTION_N dims][item along rows][dim], from row `first` on.
template <class Type, class Arithmetic>
void pack_values(const HeadRows<Type>& values, int64_t first, int64_t n_tiles, int64_t n_items,
                 typename Arithmetic::Item* to) {
    for (int64_t item = 0; item < n_items; item++) {
        const int64_t row = first + item * Arithmetic::STEP;
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

template <class Type> INLINE void store_row(const float* row, int64_t n, float factor, typename Type::Element* to) {
    for (int64_t d = 0; d < n; d += LANES) store_first<Type>(to + d, load<Floats>(row + d) * factor, n - d);
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
    pack_values<Type, Arithmetic>(value_rows, 0, value_tiles, token_items, values);
    for (int64_t row = first_row; row < last_row; row += M) {
        const int64_t n_rows = std::min<int64_t>(M, last_row - row);
        for (int64_t i = 0; i < M; i++) pack_row<Type, Arithmetic>(query_rows, row + i, queries + i * row_items);
        for (int64_t tile = 0; tile < key_tiles; tile++) {
            float_tile<Arithmetic, M>(queries, row_items, 1, keys + tile * dim_items * N, dim_items, logits + tile * N,
                                      padded_tokens);
        }
        float factors[M];
        for (int64_t i = 0; i < M; i++) {
            float* logit_row = logits + i * padded_tokens;
            std::fill(logit_row + tokens, logit_row + padded_tokens, -std::numeric_limits<float>::infinity());
            factors[i] = softmax_row<Arithmetic>(logit_row, padded_tokens, task.scale, weights + i * token_items);
        }
        for (int64_t tile = 0; tile < value_tiles; tile++) {
            float_tile<Arithmetic, M>(weights, token_items, 1, values + tile * token_items * N, token_items,
                                      out + tile * N, padded_dim);
        }
        for (int64_t i = 0; i < n_rows; i++) {
            Element* to = static_cast<Element*>(task.out) + (image * tokens + row + i) * width + head * dim;
            store_row<Type>(out + i * padded_dim, dim, factors[i], to);
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

// The gradient of an Attention whose scale is that of the logits times log2 e.
struct AttentionBackward {
    Attention forward;  // out is not used
    float logit_scale;
    const void* grad;  // [batch][tokens][heads * dim], of the result
    void* grad_qkv;    // [batch][tokens][3 * heads * dim]
};

// One row of logits and of the gradients of weights, n values each, to weights and to the gradients of logits.
INLINE void softmax_row_backward(float* logits, float* grads, int64_t n, float scale) {
    Floats best = splat(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < n; i += LANES) best = largest(best, load<Floats>(logits + i));
    const Floats offset = splat(largest_of(best) * scale);
    Floats sum = {}, inner = {};
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats weight = exp2_of(load<Floats>(logits + i) * scale - offset);
        sum += weight;
        inner += weight * load<Floats>(grads + i);
        store(logits + i, weight);
    }
    const float factor = 1.0f / sum_of(sum), mean = sum_of(inner) * factor;
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats weight = load<Floats>(logits + i) * factor;
        store(logits + i, weight);
        store(grads + i, weight * (load<Floats>(grads + i) - mean));
    }
}

constexpr int64_t ATTENTION_BLOCK = 8 * ATTENTION_M;  // queries whose maps are kept for the products along queries

// Of one head. Weights and their gradients are made for ATTENTION_M queries at a time, and used at once for the gradient
// of those queries; they are kept, STEP queries an item, until a block of them is multiplied into those of keys and
// values, which are sums over queries.
template <class Type, class Arithmetic> void attend_backward(const AttentionBackward& task, int64_t image, int64_t head) {
    typedef typename Arithmetic::Item Item;
    typedef typename Type::Element Element;
    constexpr int STEP = Arithmetic::STEP, N = ATTENTION_N, M = ATTENTION_M;
    const Attention& forward = task.forward;
    const int64_t tokens = forward.tokens, dim = forward.dim, width = forward.heads * dim;
    const int64_t key_tiles = (tokens + N - 1) / N, value_tiles = (dim + N - 1) / N;
    const int64_t padded_tokens = key_tiles * N, padded_dim = value_tiles * N;
    const int64_t dim_items = (dim + STEP - 1) / STEP, token_items = padded_tokens / STEP;
    const int64_t row_items = padded_dim / STEP, block_items = ATTENTION_BLOCK / STEP;
    const Element* first = static_cast<const Element*>(forward.qkv) + image * forward.batch_stride + head * dim;
    const Element* grad = static_cast<const Element*>(task.grad) + image * tokens * width + head * dim;
    Element* out = static_cast<Element*>(task.grad_qkv) + image * tokens * 3 * width + head * dim;
    const HeadRows<Type> query_rows{first, tokens, dim, forward.token_stride};
    const HeadRows<Type> key_rows{first + width, tokens, dim, forward.token_stride};
    const HeadRows<Type> value_rows{first + 2 * width, tokens, dim, forward.token_stride};
    const HeadRows<Type> grad_rows{grad, tokens, dim, width};

    thread_local Scratch panel_memory, row_memory, map_memory, kept_memory, sum_memory;
    Item* keys = panel_memory.get<Item>((2 * dim_items + row_items) * padded_tokens + 2 * row_items * ATTENTION_BLOCK);
    Item* values = keys + dim_items * padded_tokens;
    Item* keys_by_dim = values + dim_items * padded_tokens;
    Item* queries_by_dim = keys_by_dim + row_items * padded_tokens;
    Item* grads_by_dim = queries_by_dim + row_items * ATTENTION_BLOCK;
    Item* queries = row_memory.get<Item>(2 * std::max(M, N) * row_items + M * token_items);
    Item* grads = queries + std::max(M, N) * row_items;
    Item* through = grads + std::max(M, N) * row_items;
    float* weights = map_memory.get<float>(2 * M * padded_tokens + M * padded_dim);
    float* weight_grads = weights + M * padded_tokens;
    float* query_grads = weight_grads + M * padded_tokens;
    Item* kept_weights = kept_memory.get<Item>(2 * (block_items * padded_tokens + M));  // tiles reach past the last key
    Item* kept_through = kept_weights + block_items * padded_tokens + M;
    float* key_grads = sum_memory.get<float>(2 * (padded_tokens + M) * padded_dim);
    float* value_grads = key_grads + (padded_tokens + M) * padded_dim;
    std::fill(key_grads, key_grads + 2 * (padded_tokens + M) * padded_dim, 0.0f);

    pack_keys<Type, Arithmetic>(key_rows, key_tiles, dim_items, row_items, queries, keys);
    pack_keys<Type, Arithmetic>(value_rows, key_tiles, dim_items, row_items, queries, values);
    pack_values<Type, Arithmetic>(key_rows, 0, value_tiles, token_items, keys_by_dim);
    for (int64_t block = 0; block < tokens; block += ATTENTION_BLOCK) {
        const int64_t last = std::min(block + ATTENTION_BLOCK, tokens);
        const int64_t n_items = (last - block + M - 1) / M * M / STEP;
        pack_values<Type, Arithmetic>(query_rows, block, value_tiles, n_items, queries_by_dim);
        pack_values<Type, Arithmetic>(grad_rows, block, value_tiles, n_items, grads_by_dim);
        for (int64_t row = block; row < last; row += M) {
            for (int64_t i = 0; i < M; i++) {
                pack_row<Type, Arithmetic>(query_rows, row + i, queries + i * row_items);
                pack_row<Type, Arithmetic>(grad_rows, row + i, grads + i * row_items);
            }
            for (int64_t tile = 0; tile < key_tiles; tile++) {
                const int64_t panel = tile * dim_items * N;
                float_tile<Arithmetic, M>(queries, row_items, 1, keys + panel, dim_items, weights + tile * N,
                                          padded_tokens);
                float_tile<Arithmetic, M>(grads, row_items, 1, values + panel, dim_items, weight_grads + tile * N,
                                          padded_tokens);
            }
            for (int64_t i = 0; i < M; i++) {
                float *weight = weights + i * padded_tokens, *grad_row = weight_grads + i * padded_tokens;
                std::fill(weight + tokens, weight + padded_tokens, -std::numeric_limits<float>::infinity());
                softmax_row_backward(weight, grad_row, padded_tokens, forward.scale);
                for (int64_t k = 0; k < padded_tokens; k += LANES) {
                    Arithmetic::store_items(through + i * token_items + k / STEP, load<Floats>(grad_row + k));
                }
            }
            for (int64_t i = 0; i < M; i += STEP) {
                const int64_t to = (row - block + i) / STEP * padded_tokens;
                for (int64_t k = 0; k < padded_tokens; k += LANES) {
                    const auto pair = [&](const float* map) {
                        const float* from = map + i * padded_tokens + k;
                        return Arithmetic::interleave(Arithmetic::round(load<Floats>(from)),
                                                      Arithmetic::round(load<Floats>(from + (STEP - 1) * padded_tokens)));
                    };
                    store(kept_weights + to + k, pair(weights));
                    store(kept_through + to + k, pair(weight_grads));
                }
            }
            for (int64_t tile = 0; tile < value_tiles; tile++) {
                float_tile<Arithmetic, M>(through, token_items, 1, keys_by_dim + tile * token_items * N, token_items,
                                          query_grads + tile * N, padded_dim);
            }
            for (int64_t i = 0; i < std::min<int64_t>(M, last - row); i++) {
                store_row<Type>(query_grads + i * padded_dim, dim, task.logit_scale, out + (row + i) * 3 * width);
            }
        }
        for (int64_t key = 0; key < tokens; key += M) {
            for (int64_t tile = 0; tile < value_tiles; tile++) {
                const int64_t panel = tile * n_items * N, to = key * padded_dim + tile * N;
                float_tile<Arithmetic, M, true>(kept_weights + key, 1, padded_tokens, grads_by_dim + panel, n_items,
                                                value_grads + to, padded_dim);
                float_tile<Arithmetic, M, true>(kept_through + key, 1, padded_tokens, queries_by_dim + panel, n_items,
                                                key_grads + to, padded_dim);
            }
        }
    }
    for (int64_t key = 0; key < tokens; key++) {
        store_row<Type>(key_grads + key * padded_dim, dim, task.logit_scale, out + key * 3 * width + width);
        store_row<Type>(value_grads + key * padded_dim, dim, 1.0f, out + key * 3 * width + 2 * width);
    }
}

inline void run(const AttentionBackward& task, int64_t threads) {
    const int64_t heads = task.forward.heads;
    if (task.forward.tokens == 0 || task.forward.dim == 0) return;
    parallel_for(task.forward.batch * heads, threads, [&](int64_t item) {
#if TETRA_AVX512 && defined(__AVX512BF16__)
        if (task.forward.format == BFLOAT16) {
            return attend_backward<BFloat16, PairItems>(task, item / heads, item % heads);
        }
#endif
        with_type(task.forward.format, [&](auto type) {
            attend_backward<decltype(type), FloatItems>(task, item / heads, item % heads);
        });
    });
}

}  // namespace tetra

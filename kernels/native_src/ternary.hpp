// Products of int8 activations with ternary weights that stay packed at 2 bits.
//
// TILE_N weight rows at a time are unpacked into a panel, in the order in which the products read it; a block of
// panels that the cache holds serves all rows of the activations before the next block is unpacked. A tile of
// TILE_M x TILE_N sums stays in registers for the whole of K. The packed layout is that of ternary_matmul.py.
//
// The instructions of x86 that multiply bytes want one operand without sign. There the weights become code + 1,
// in {0, 1, 2}:   sum(code x) = sum((code + 1) x) - sum(x),   sum(x) once a row.

#pragma once

#include <algorithm>

#include "parallel.hpp"
#include "vectors.hpp"

namespace tetra {

constexpr int GROUP = 128;  // values along K that are packed together
constexpr int GROUP_WORDS = 8;
constexpr int PLANES = 4;  // values a byte
constexpr int RUN = 4;     // values along K, side by side in a word, that one step of the products takes
constexpr int GROUP_RUNS = GROUP / RUN;

INLINE uint32_t word_at(const void* from) {
    uint32_t word;
    std::memcpy(&word, from, 4);
    return word;
}

// --- tiles, by instruction set -----------------------------------------------------------------------------

#if (TETRA_AVX512 && defined(__AVX512VNNI__)) || (TETRA_AVX2 && defined(__AVXVNNI__)) || TETRA_NEON_DOT

// Four products of bytes and their sum in one instruction.
#define TETRA_DOT 1
typedef uint32_t Weight;  // four codes + CODE_OFFSET, neighbours along K
constexpr int TILE_N = 2 * LANES;
constexpr int TILE_M = TETRA_AVX2 ? 6 : 14;  // of 16 or 32 registers, all but the operands hold sums

INLINE Ints add_products(Ints sums, Words weights, Words x) {
#if TETRA_AVX512
    return bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(sums), bits<__m512i>(weights), bits<__m512i>(x)));
#elif TETRA_AVX2
    return bits<Ints>(_mm256_dpbusd_avx_epi32(bits<__m256i>(sums), bits<__m256i>(weights), bits<__m256i>(x)));
#else
    return bits<Ints>(vdotq_s32(bits<int32x4_t>(sums), bits<int8x16_t>(weights), bits<int8x16_t>(x)));
#endif
}

template <int ROWS>
void product_tile(const int8_t* x, int64_t stride, const Weight* panel, int64_t n_runs, const int32_t* x_sums,
                  int32_t* out) {
    Ints sums[ROWS][2];
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = Ints{} - x_sums[row];
    for (int64_t run = 0; run < n_runs; run++) {
        const Words first = load<Words>(panel + run * TILE_N);
        const Words second = load<Words>(panel + run * TILE_N + LANES);
#pragma GCC unroll 14
        for (int row = 0; row < ROWS; row++) {
            const Words values = Words{} + word_at(x + row * stride + RUN * run);
            sums[row][0] = add_products(sums[row][0], first, values);
            sums[row][1] = add_products(sums[row][1], second, values);
        }
    }
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; row++) {
        store(out + row * TILE_N, sums[row][0]);
        store(out + row * TILE_N + LANES, sums[row][1]);
    }
}

#elif TETRA_AVX512 || TETRA_AVX2

// Products of bytes are summed in pairs to 16 bits, which hold a group: 32 x 2 x 2 x 128 < 2^15.
typedef uint32_t Weight;
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
constexpr int TILE_N = 2 * LANES;
constexpr int TILE_M = TETRA_AVX2 ? 5 : 12;

INLINE Shorts products_of_pairs(Words weights, Words x) {
#if TETRA_AVX512
    return bits<Shorts>(_mm512_maddubs_epi16(bits<__m512i>(weights), bits<__m512i>(x)));
#else
    return bits<Shorts>(_mm256_maddubs_epi16(bits<__m256i>(weights), bits<__m256i>(x)));
#endif
}

INLINE Ints sums_of_pairs(Shorts v) {
#if TETRA_AVX512
    return bits<Ints>(_mm512_madd_epi16(bits<__m512i>(v), _mm512_set1_epi16(1)));
#else
    return bits<Ints>(_mm256_madd_epi16(bits<__m256i>(v), _mm256_set1_epi16(1)));
#endif
}

template <int ROWS>
void product_tile(const int8_t* x, int64_t stride, const Weight* panel, int64_t n_runs, const int32_t* x_sums,
                  int32_t* out) {
    for (int row = 0; row < ROWS; row++) std::fill_n(out + row * TILE_N, TILE_N, -x_sums[row]);
    for (int64_t start = 0; start < n_runs; start += GROUP_RUNS) {
        Shorts sums[ROWS][2];
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = Shorts{};
        for (int64_t run = start; run < std::min(n_runs, start + GROUP_RUNS); run++) {
            const Words first = load<Words>(panel + run * TILE_N);
            const Words second = load<Words>(panel + run * TILE_N + LANES);
#pragma GCC unroll 12
            for (int row = 0; row < ROWS; row++) {
                const Words values = Words{} + word_at(x + row * stride + RUN * run);
                sums[row][0] += products_of_pairs(first, values);
                sums[row][1] += products_of_pairs(second, values);
            }
        }
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            int32_t* to = out + row * TILE_N;
            store(to, load<Ints>(to) + sums_of_pairs(sums[row][0]));
            store(to + LANES, load<Ints>(to + LANES) + sums_of_pairs(sums[row][1]));
        }
    }
}

#else

// Any machine: products in 16 bits, which hold the sum of a group: 128 x 128 < 2^15.
typedef int16_t Weight;  // codes, [K][TILE_N]
typedef int16_t Shorts __attribute__((vector_size(16)));
constexpr int TILE_N = 16;
constexpr int TILE_M = 4;

template <int ROWS>
void product_tile(const int8_t* x, int64_t stride, const Weight* panel, int64_t n_runs, const int32_t*,
                  int32_t* out) {
    std::memset(out, 0, sizeof(int32_t) * ROWS * TILE_N);
    for (int64_t start = 0; start < RUN * n_runs; start += GROUP) {
        Shorts sums[ROWS][2];
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = Shorts{};
        for (int64_t k = start; k < std::min(RUN * n_runs, start + GROUP); k++) {
            const Shorts first = load<Shorts>(panel + k * TILE_N), second = load<Shorts>(panel + k * TILE_N + 8);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) {
                const Shorts value = Shorts{} + static_cast<int16_t>(x[row * stride + k]);
                sums[row][0] += first * value;
                sums[row][1] += second * value;
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) {
            for (int i = 0; i < TILE_N; i++) out[row * TILE_N + i] += sums[row][i / 8][i % 8];
        }
    }
}

#endif

// Byte products on x86 take one operand without sign.
constexpr int CODE_OFFSET = TETRA_AVX512 || TETRA_AVX2 ? 1 : 0;
constexpr int TILE_VECTORS = TILE_N / LANES;
constexpr int WEIGHTS_A_RUN = sizeof(Weight) == 4 ? 1 : RUN;  // elements of a panel for a run and a weight row

typedef void (*ProductTile)(const int8_t*, int64_t, const Weight*, int64_t, const int32_t*, int32_t*);

template <int ROWS> INLINE ProductTile product_tile_of(int rows) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return product_tile_of<ROWS - 1>(rows);
    }
    return product_tile<ROWS>;
}

// --- unpacking ---------------------------------------------------------------------------------------------

typedef int8_t WordBytes __attribute__((vector_size(4 * LANES)));

// `words[i][row]` = word i of a group in LANES weight rows; rows past `n_rows` are zero.
INLINE void transpose_group(const uint8_t* packed, int64_t stride, int64_t n_rows, Words (&words)[GROUP_WORDS]) {
    uint32_t buffer[GROUP_WORDS][LANES] = {};
    for (int64_t row = 0; row < n_rows; row++) {
        for (int i = 0; i < GROUP_WORDS; i++) buffer[i][row] = word_at(packed + row * stride + 4 * i);
    }
    std::memcpy(words, buffer, sizeof(buffer));
}

// TILE_N weight rows of `n_groups` groups each, of which `n_rows` exist, to panel[run][row].
inline void unpack_panel(const uint8_t* packed, int64_t n_groups, int64_t n_rows, Weight* panel) {
    const int64_t stride = n_groups * 4 * GROUP_WORDS;
    for (int64_t group = 0; group < n_groups; group++) {
        for (int part = 0; part < TILE_VECTORS; part++) {
            const int64_t first = part * LANES;
            Words words[GROUP_WORDS];
            transpose_group(packed + first * stride + group * 4 * GROUP_WORDS, stride,
                            std::min<int64_t>(std::max<int64_t>(n_rows - first, 0), LANES), words);
            for (int i = 0; i < GROUP_WORDS; i++) {
                // Adds 1 to every pair of bits: 11, 00, 01 become 00, 01, 10.
                const Words codes = words[i] ^ 0x55555555u ^ ((words[i] & 0x55555555u) << 1);
                for (int plane = 0; plane < PLANES; plane++) {
                    Words run = (codes >> (2 * plane)) & 0x03030303u;
                    if constexpr (CODE_OFFSET == 0) run = bits<Words>(bits<WordBytes>(run) - 1);
                    Weight* to = panel + (group * GROUP_RUNS + plane * GROUP_WORDS + i) * TILE_N * WEIGHTS_A_RUN;
                    if constexpr (WEIGHTS_A_RUN == 1) {
                        store(to + first, run);
                    } else {
                        for (int value = 0; value < RUN; value++) {
                            for (int lane = 0; lane < LANES; lane++) {
                                const int shift = 8 * value;
                                to[value * TILE_N + first + lane] = static_cast<int8_t>(run[lane] >> shift);
                            }
                        }
                    }
                }
            }
        }
    }
}

// --- the layer ---------------------------------------------------------------------------------------------

// out[m][n] = sum_k x[m][k] code[n][k] for INT32; for the other formats of `out`
//   y = sum * (scale[m] * weight_scale) + bias[n];  y = gelu(y);  y *= column_scale where n < scaled_columns;
//   y += residual[m][n]
struct TernaryLinear {
    const int8_t* x;  // [m][x_stride], of which k count, a multiple of RUN
    int64_t m, n, k, x_stride;
    const uint8_t* packed;
    const float* scale;
    float weight_scale;
    const void* bias;
    int32_t bias_format;
    const void* residual;
    int32_t residual_format;
    int64_t residual_stride;
    bool gelu;
    int64_t scaled_columns;
    float column_scale;
    void* out;  // [m][n]
    int32_t out_format;
    int64_t block_bytes;  // of the second-level cache, for a block of unpacked weights, or of activations
};

struct ColumnFactors {
    float bias[TILE_N], scale[TILE_N];

    ColumnFactors(const TernaryLinear& layer, int64_t first) {
        std::fill_n(bias, TILE_N, 0.0f);
        const int64_t count = std::min<int64_t>(layer.n - first, TILE_N);
        if (layer.bias) to_floats(layer.bias, layer.bias_format, first, count, bias);
        for (int i = 0; i < TILE_N; i++) scale[i] = first + i < layer.scaled_columns ? layer.column_scale : 1.0f;
    }
};

template <class Out, class Residual>
void finish_tile(const TernaryLinear& layer, const ColumnFactors& columns, const int32_t* sums, int64_t first_m,
                 int64_t n_rows, int64_t first_n) {
    typename Out::Element* out = static_cast<typename Out::Element*>(layer.out);
    const typename Residual::Element* residual = static_cast<const typename Residual::Element*>(layer.residual);
    for (int64_t row = 0; row < n_rows; row++) {
        const int64_t m = first_m + row;
        const Floats factor = splat(layer.scale[m] * layer.weight_scale);
        for (int part = 0; part < TILE_VECTORS; part++) {
            const int64_t n = first_n + part * LANES;
            if (n >= layer.n) break;
            Floats y = __builtin_convertvector(load<Ints>(sums + row * TILE_N + part * LANES), Floats) * factor;
            y = y + load<Floats>(columns.bias + part * LANES);
            if (layer.gelu) y = gelu_of(y);
            if (layer.scaled_columns) y = y * load<Floats>(columns.scale + part * LANES);
            if (residual) y = y + load_first<Residual>(residual + m * layer.residual_stride + n, layer.n - n);
            store_first<Out>(out + m * layer.n + n, y, layer.n - n);
        }
    }
}

inline void finish_tile(const TernaryLinear& layer, const ColumnFactors& columns, const int32_t* sums,
                        int64_t first_m, int64_t n_rows, int64_t first_n) {
    if (layer.out_format == INT32) {
        const int64_t count = std::min<int64_t>(layer.n - first_n, TILE_N);
        for (int64_t row = 0; row < n_rows; row++) {
            int32_t* to = static_cast<int32_t*>(layer.out) + (first_m + row) * layer.n + first_n;
            std::memcpy(to, sums + row * TILE_N, count * sizeof(int32_t));
        }
        return;
    }
    with_type(layer.out_format, [&](auto out) {
        with_type(layer.residual_format, [&](auto residual) {
            finish_tile<decltype(out), decltype(residual)>(layer, columns, sums, first_m, n_rows, first_n);
        });
    });
}

inline int32_t sum_of_codes(const int8_t* x, int64_t n) {
    int32_t total = 0;
    int64_t i = 0;
#if TETRA_DOT
    Ints sums = {};
    for (; i + 4 * LANES <= n; i += 4 * LANES) sums = add_products(sums, Words{} + 0x01010101u, load<Words>(x + i));
    total = sum_of(sums);
#endif
    for (; i < n; i++) total += x[i];
    return total;
}

inline void run(const TernaryLinear& layer, int64_t threads) {
    if (layer.m == 0 || layer.n == 0) return;
    const int64_t n_groups = (layer.k + GROUP - 1) / GROUP, n_runs = layer.k / RUN;
    const int64_t panel_size = n_groups * GROUP_RUNS * TILE_N * WEIGHTS_A_RUN;
    const int64_t n_panels = (layer.n + TILE_N - 1) / TILE_N;
    // Blocks of weights for all threads, a few for each so that a slow one can be helped.
    int64_t block = std::max<int64_t>(layer.block_bytes / std::max<int64_t>(panel_size * sizeof(Weight), 1), 1);
    block = std::max<int64_t>(std::min(block, n_panels / (8 * threads)), 1);
    const int64_t n_blocks = (n_panels + block - 1) / block;
    // Too few blocks: the rows of x are divided too, at the price of unpacking a block more than once.
    const int64_t n_tiles_m = (layer.m + TILE_M - 1) / TILE_M;
    const int64_t n_parts = std::min(std::max<int64_t>(threads / n_blocks, 1), std::max<int64_t>(n_tiles_m / 4, 1));
    // Within a part, the rows that stay in the cache while the panels of a block pass by.
    const int64_t chunk = std::max<int64_t>(layer.block_bytes / (TILE_M * std::max<int64_t>(layer.k, 1)), 1);

    thread_local Scratch sum_memory;
    int32_t* x_sums = sum_memory.get<int32_t>(layer.m);
    if (CODE_OFFSET) {
        constexpr int64_t ROWS_A_TASK = 32;
        parallel_for((layer.m + ROWS_A_TASK - 1) / ROWS_A_TASK, threads, [&](int64_t task) {
            for (int64_t m = task * ROWS_A_TASK; m < std::min(layer.m, (task + 1) * ROWS_A_TASK); m++) {
                x_sums[m] = sum_of_codes(layer.x + m * layer.x_stride, layer.k);
            }
        });
    } else {
        std::fill_n(x_sums, layer.m, 0);
    }
    parallel_for(n_blocks * n_parts, threads, [&](int64_t item) {
        thread_local Scratch panel_memory;
        const int64_t first_panel = item % n_blocks * block, last_panel = std::min(first_panel + block, n_panels);
        const int64_t first_tile = item / n_blocks * n_tiles_m / n_parts;
        const int64_t last_tile = (item / n_blocks + 1) * n_tiles_m / n_parts;
        Weight* panels = panel_memory.get<Weight>(block * panel_size);
        for (int64_t panel = first_panel; panel < last_panel; panel++) {
            unpack_panel(layer.packed + panel * TILE_N * n_groups * 4 * GROUP_WORDS, n_groups,
                         layer.n - panel * TILE_N, panels + (panel - first_panel) * panel_size);
        }
        // Tiles of equal height, give or take one row.
        const auto row_of = [&](int64_t tile) { return tile * layer.m / n_tiles_m; };
        for (int64_t start = first_tile; start < last_tile; start += chunk) {
            const int64_t end = std::min(start + chunk, last_tile);
            for (int64_t panel = first_panel; panel < last_panel; panel++) {
                const ColumnFactors columns(layer, panel * TILE_N);
                for (int64_t tile = start; tile < end; tile++) {
                    const int64_t m = row_of(tile), n_rows = row_of(tile + 1) - m;
                    alignas(64) int32_t sums[TILE_M * TILE_N];
                    product_tile_of<TILE_M>(static_cast<int>(n_rows))(
                        layer.x + m * layer.x_stride, layer.x_stride, panels + (panel - first_panel) * panel_size,
                        n_runs, x_sums + m, sums);
                    finish_tile(layer, columns, sums, m, n_rows, panel * TILE_N);
                }
            }
        }
    });
}

// A weight [n][k] as packed codes: the values times `factor`, rounded half to even and clipped to -1, 0, 1.
struct PackTernary {
    const float* weight;
    int64_t n, k;
    float factor;
    uint8_t* packed;  // [n][ceil(k / GROUP) * GROUP / PLANES]
};

inline void run(const PackTernary& task, int64_t threads) {
    constexpr int64_t group_bytes = GROUP / PLANES;
    const int64_t groups = (task.k + GROUP - 1) / GROUP;
    parallel_for(task.n, threads, [&](int64_t row) {
        const float* weight = task.weight + row * task.k;
        uint8_t* packed = task.packed + row * groups * group_bytes;
        for (int64_t group = 0; group < groups; group++, packed += group_bytes) {
            for (int64_t byte = 0; byte < group_bytes; byte += LANES) {
                Bytes bytes = {};
                for (int plane = 0; plane < PLANES; plane++) {
                    const int64_t first = group * GROUP + plane * group_bytes + byte;
                    if (first >= task.k) continue;
                    const Floats w = load_first<Float32>(weight + first, task.k - first) * task.factor;
                    const Floats clipped = -largest(splat(-1.0f), -largest(splat(-1.0f), w));
                    bytes |= (round_to_bytes(clipped) & 3) << (2 * plane);
                }
                store(packed + byte, bytes);
            }
        }
    });
}

}  // namespace tetra

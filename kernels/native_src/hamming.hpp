// Hamming distances of packed codes: the nearest rows, the rows within a distance, or all distances.
//
// Rows of the database are read where they lie, eight at a time, and meet two queries before the next ones are
// loaded. A block of rows stays in the second-level cache while a group of queries passes over it. With one query
// that is one pass over the database at the speed of memory.

#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "parallel.hpp"
#include "vectors.hpp"

namespace tetra {

constexpr int64_t HAMMING_ROWS = 8;  // as many bytes of `allowed` as a 64-bit word
typedef int32_t Eight __attribute__((vector_size(32)));

// `Counts`: a Sum takes in BYTES of two codes at a time; eight Sums become eight distances.

#if TETRA_AVX512 && defined(__AVX512VPOPCNTDQ__)
struct Counts {
    typedef __m512i Bits;
    typedef __m512i Sum;
    static constexpr int64_t BYTES = 64;
    static INLINE Bits load(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static INLINE Bits load_first(const uint8_t* from, int64_t n) {
        return _mm512_maskz_loadu_epi8(~0ull >> (64 - n), from);
    }
    static INLINE Sum add(Sum sum, Bits a, Bits b) {
        return _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(a, b)));
    }
    // Sums are below 2^32: two share a vector of 32-bit numbers, and all are added in a tree.
    static INLINE Eight distances(const Sum* sums) {
        __m512i pairs[4], fours[2];
        for (int i = 0; i < 4; i++) {
            pairs[i] = _mm512_or_si512(sums[2 * i], _mm512_slli_epi64(sums[2 * i + 1], 32));
        }
        for (int i = 0; i < 2; i++) {
            fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                        _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
        }
        const __m512i halves = _mm512_add_epi32(_mm512_shuffle_i64x2(fours[0], fours[1], 0x44),
                                                _mm512_shuffle_i64x2(fours[0], fours[1], 0xee));
        const __m512i whole = _mm512_add_epi32(halves, _mm512_shuffle_i64x2(halves, halves, 0xb1));
        return bits<Eight>(_mm512_castsi512_si256(_mm512_shuffle_i64x2(whole, whole, 0x08)));
    }
};
#elif TETRA_NEON_DOT
struct Counts {
    typedef uint8x16_t Bits;
    typedef uint32x4_t Sum;
    static constexpr int64_t BYTES = 16;
    static INLINE Bits load(const uint8_t* from) { return vld1q_u8(from); }
    static INLINE Bits load_first(const uint8_t* from, int64_t n) {
        uint8_t buffer[BYTES] = {};
        std::memcpy(buffer, from, n);
        return load(buffer);
    }
    static INLINE Sum add(Sum sum, Bits a, Bits b) {
        return vdotq_u32(sum, vcntq_u8(veorq_u8(a, b)), vdupq_n_u8(1));
    }
    static INLINE Eight distances(const Sum* sums) {
        Eight result;
        for (int i = 0; i < 8; i++) result[i] = static_cast<int32_t>(vaddvq_u32(sums[i]));
        return result;
    }
};
#else
struct Counts {
    typedef uint64_t Bits;
    typedef uint64_t Sum;
    static constexpr int64_t BYTES = 8;
    static INLINE Bits load(const uint8_t* from) { return tetra::load<uint64_t>(from); }
    static INLINE Bits load_first(const uint8_t* from, int64_t n) {
        uint64_t word = 0;
        std::memcpy(&word, from, n);
        return word;
    }
    static INLINE Sum add(Sum sum, Bits a, Bits b) { return sum + __builtin_popcountll(a ^ b); }
    static INLINE Eight distances(const Sum* sums) {
        Eight result;
        for (int i = 0; i < 8; i++) result[i] = static_cast<int32_t>(sums[i]);
        return result;
    }
};
#endif

#if TETRA_AVX512
#define KEEP_IN_REGISTER(vector) asm("" : "+v"(vector))
#else
#define KEEP_IN_REGISTER(vector)
#endif

INLINE bool any_at_most(Eight distances, int32_t most) {
#if TETRA_AVX512 || TETRA_AVX2
    const __m256i larger = _mm256_cmpgt_epi32(bits<__m256i>(distances), _mm256_set1_epi32(most));
    return _mm256_movemask_epi8(larger) != -1;
#else
    int32_t least = distances[0];
    for (int i = 1; i < 8; i++) least = std::min(least, distances[i]);
    return least <= most;
#endif
}

// Codes of n_bytes; rows at strides, in bytes.
struct Hamming {
    const uint8_t* queries;
    int64_t n_queries, query_stride;
    const uint8_t* database;
    int64_t n_rows, row_stride;
    int64_t n_bytes;
    const uint8_t* allowed;  // [n_rows], 0: as if the row were not there; null: all are
    int64_t block_bytes;     // of rows that a group of queries passes over: a share of one core's second-level cache
};

// sums[q][r] += what differs in BYTES or, where MASKED, fewer bytes of QUERIES queries and some rows.
template <int QUERIES, int ROWS, bool MASKED>
INLINE void hamming_step(const uint8_t* const* codes, const uint8_t* const* rows, int64_t first, int64_t left,
                         int64_t ahead, Counts::Sum (*sums)[HAMMING_ROWS]) {
    const auto load = [&](const uint8_t* from) {
        return MASKED ? Counts::load_first(from + first, left) : Counts::load(from + first);
    };
    Counts::Bits code[QUERIES];
    for (int q = 0; q < QUERIES; q++) code[q] = load(codes[q]);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        if (ahead) __builtin_prefetch(rows[r] + first + ahead);
        Counts::Bits row = load(rows[r]);
        KEEP_IN_REGISTER(row);  // or it would be loaded for every query
        for (int q = 0; q < QUERIES; q++) sums[q][r] = Counts::add(sums[q][r], row, code[q]);
    }
}

// distances[q][r] of QUERIES queries and eight rows, of which ROWS are read side by side.
template <int QUERIES, int ROWS>
INLINE void hamming_tile(const Hamming& task, int64_t query, int64_t row, int64_t ahead, Eight* distances) {
    const uint8_t *codes[QUERIES], *rows[HAMMING_ROWS];
    for (int q = 0; q < QUERIES; q++) codes[q] = task.queries + (query + q) * task.query_stride;
    for (int64_t r = 0; r < HAMMING_ROWS; r++) {  // past the end the last row again, which callers leave out
        rows[r] = task.database + std::min(row + r, task.n_rows - 1) * task.row_stride;
    }
    Counts::Sum sums[QUERIES][HAMMING_ROWS] = {};
    const int64_t whole = task.n_bytes / Counts::BYTES * Counts::BYTES, left = task.n_bytes - whole;
    for (int64_t r = 0; r < HAMMING_ROWS; r += ROWS) {
        Counts::Sum some[QUERIES][HAMMING_ROWS] = {};
        if (left) hamming_step<QUERIES, ROWS, true>(codes, rows + r, whole, left, ahead, some);
        for (int64_t i = 0; i < whole; i += Counts::BYTES) {
            hamming_step<QUERIES, ROWS, false>(codes, rows + r, i, 0, ahead, some);
        }
        for (int q = 0; q < QUERIES; q++) std::copy(some[q], some[q] + ROWS, sums[q] + r);
    }
    for (int q = 0; q < QUERIES; q++) distances[q] = Counts::distances(sums[q]);
}

INLINE bool any_allowed(const Hamming& task, int64_t row) {
    if (!task.allowed) return true;
    if (row + HAMMING_ROWS <= task.n_rows) return load<uint64_t>(task.allowed + row) != 0;
    return std::any_of(task.allowed + row, task.allowed + task.n_rows, [](uint8_t value) { return value != 0; });
}

// Makes the processor look up pages before their rows are read, by a line of each: the pages of a tile at its start or,
// where several tiles lie in a page, one that is some pages ahead. So much was measured to be best.
INLINE void look_up_pages(const Hamming& task, int64_t row) {
    constexpr int64_t page = 4096, pages_ahead = 16;
    const int64_t tile = HAMMING_ROWS * task.row_stride;
    const uint8_t* from = task.database + row * task.row_stride;
    if (tile <= page) return __builtin_prefetch(from + pages_ahead * page);
    for (int64_t i = 0; i < tile; i += page) __builtin_prefetch(from + i);
}

// sink(query + i, row, distances[i]) for some queries and every eight rows of a part, rows ascending.
template <int QUERIES, int ROWS, class Sink>
INLINE void hamming_rows(const Hamming& task, int64_t query, int64_t first_row, int64_t last_row, int64_t ahead,
                         Sink& sink) {
    Eight distances[QUERIES];
    for (int64_t row = first_row; row < last_row; row += HAMMING_ROWS) {
        if (!any_allowed(task, row)) continue;
        if (ahead) look_up_pages(task, row);
        hamming_tile<QUERIES, ROWS>(task, query, row, ahead, distances);
        for (int q = 0; q < QUERIES; q++) sink(query + q, row, distances[q]);
    }
}

constexpr int64_t HAMMING_BYTES_AHEAD = 64;

// The first query brings the rows from memory, which reads one row after another fastest; the others find them in the
// cache, and take them two at a time.
template <class Sink>
void hamming_part(const Hamming& task, int64_t first_query, int64_t last_query, int64_t first_row, int64_t last_row,
                  Sink&& sink) {
    hamming_rows<1, 1>(task, first_query, first_row, last_row, HAMMING_BYTES_AHEAD, sink);
    int64_t query = first_query + 1;
    for (; query + 1 < last_query; query += 2) {
        hamming_rows<2, HAMMING_ROWS>(task, query, first_row, last_row, 0, sink);
    }
    if (query < last_query) hamming_rows<1, HAMMING_ROWS>(task, query, first_row, last_row, 0, sink);
}

constexpr int64_t HAMMING_GROUP = 64;  // queries that pass over a block before it may go to another thread

// body(slot, first_query, last_query, first_row, last_row) for parts that cover all. What has one slot runs one after
// the other, and meets any query's rows in ascending order.
template <class Body> void hamming_parts(const Hamming& task, int64_t threads, const Body& body) {
    const int64_t tiles = (task.n_rows + HAMMING_ROWS - 1) / HAMMING_ROWS;
    const int64_t fitting = std::max<int64_t>(task.block_bytes / (task.n_bytes * HAMMING_ROWS), 1);
    const int64_t shared = std::max<int64_t>(tiles / (4 * threads), 1);  // so that no thread waits long for another
    const int64_t block = std::min(fitting, shared) * HAMMING_ROWS;
    const int64_t n_blocks = (task.n_rows + block - 1) / block;
    const int64_t n_groups = (task.n_queries + HAMMING_GROUP - 1) / HAMMING_GROUP;
    std::atomic<int64_t> next{0};
    parallel_for(threads, threads, [&](int64_t slot) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n_blocks * n_groups;) {
            const int64_t row = i / n_groups * block, query = i % n_groups * HAMMING_GROUP;
            body(slot, query, std::min(query + HAMMING_GROUP, task.n_queries), row,
                 std::min(row + block, task.n_rows));
        }
    });
}

// Keys have the order of answers: by distance, then by row.
constexpr int64_t ROW_BITS = 40;
INLINE int64_t key_of(int32_t distance, int64_t row) { return static_cast<int64_t>(distance) << ROW_BITS | row; }
constexpr int64_t NO_KEY = std::numeric_limits<int64_t>::max();

// The first key of a heap, its largest, makes place for a smaller one.
INLINE void replace_largest(int64_t* heap, int64_t k, int64_t key) {
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < k; i = child) {
        if (child + 1 < k && heap[child + 1] > heap[child]) child++;
        if (heap[child] <= key) break;
        heap[i] = heap[child];
    }
    heap[i] = key;
}

// The k nearest allowed rows of every query, [n_queries][k]; -1 where there are fewer.
inline void hamming_nearest(const Hamming& task, int64_t k, int32_t* distances, int64_t* rows, int64_t threads) {
    // A slot's heap of a query has its largest key first. Rows come in ascending order, so that what is as far as
    // the k-th is too late.
    std::vector<int64_t> heaps(threads * task.n_queries * k, NO_KEY);
    hamming_parts(task, threads, [&](int64_t slot, int64_t first_query, int64_t last_query, int64_t first, int64_t last) {
        hamming_part(task, first_query, last_query, first, last, [&](int64_t query, int64_t row, Eight here) {
            int64_t* heap = heaps.data() + (slot * task.n_queries + query) * k;
            if (heap[0] != NO_KEY && !any_at_most(here, static_cast<int32_t>(heap[0] >> ROW_BITS) - 1)) return;
            const int64_t n = std::min(HAMMING_ROWS, last - row);
            for (int64_t r = 0; r < n; r++) {
                const int64_t key = key_of(here[r], row + r);
                if (key >= heap[0] || (task.allowed && !task.allowed[row + r])) continue;
                replace_largest(heap, k, key);
            }
        });
    });
    parallel_for(task.n_queries, threads, [&](int64_t query) {
        thread_local Scratch memory;
        int64_t* all = memory.get<int64_t>(threads * k);
        for (int64_t slot = 0; slot < threads; slot++) {
            std::copy_n(heaps.data() + (slot * task.n_queries + query) * k, k, all + slot * k);
        }
        std::partial_sort(all, all + k, all + threads * k);
        for (int64_t i = 0; i < k; i++) {
            distances[query * k + i] = all[i] == NO_KEY ? -1 : static_cast<int32_t>(all[i] >> ROW_BITS);
            rows[query * k + i] = all[i] == NO_KEY ? -1 : all[i] & ((int64_t{1} << ROW_BITS) - 1);
        }
    });
}

// How many allowed rows are within `radius` of every query, to counts [n_queries]; then, with the `offsets` that follow
// from them, those rows and their distances, sorted, from offsets[query] on. `rows` null: only the counts.
inline void hamming_within(const Hamming& task, int32_t radius, int64_t* counts, const int64_t* offsets,
                           int32_t* distances, int64_t* rows, int64_t threads) {
    std::vector<std::atomic<int64_t>> found(task.n_queries);
    hamming_parts(task, threads, [&](int64_t, int64_t first_query, int64_t last_query, int64_t first, int64_t last) {
        hamming_part(task, first_query, last_query, first, last, [&](int64_t query, int64_t row, Eight here) {
            if (!any_at_most(here, radius)) return;
            const int64_t n = std::min(HAMMING_ROWS, last - row);
            for (int64_t r = 0; r < n; r++) {
                if (here[r] > radius || (task.allowed && !task.allowed[row + r])) continue;
                const int64_t place = found[query].fetch_add(1, std::memory_order_relaxed);
                if (rows) rows[offsets[query] + place] = key_of(here[r], row + r);
            }
        });
    });
    parallel_for(task.n_queries, threads, [&](int64_t query) {
        if (!rows) {
            counts[query] = found[query];
            return;
        }
        int64_t *first = rows + offsets[query], *last = first + found[query];
        std::sort(first, last);
        for (int64_t* key = first; key < last; key++) {
            distances[key - rows] = static_cast<int32_t>(*key >> ROW_BITS);
            *key &= (int64_t{1} << ROW_BITS) - 1;
        }
    });
}

// out [n_queries][n_rows]
inline void hamming_all(const Hamming& task, int32_t* out, int64_t threads) {
    hamming_parts(task, threads, [&](int64_t, int64_t first_query, int64_t last_query, int64_t first, int64_t last) {
        hamming_part(task, first_query, last_query, first, last, [&](int64_t query, int64_t row, Eight distances) {
            std::memcpy(out + query * task.n_rows + row, &distances, std::min(HAMMING_ROWS, last - row) * 4);
        });
    });
}

}  // namespace tetra

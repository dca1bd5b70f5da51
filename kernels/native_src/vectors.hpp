// Vectors of the width that this machine has, and the elementary functions on them.
//
// Written with the vector extension that GCC and Clang share, so that one source serves AVX-512, AVX2, SSE2 and
// NEON; the few operations that the extension has no words for are intrinsics, with a plain loop beside them.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define TETRA_NEON_DOT 1
#endif

#define INLINE inline __attribute__((always_inline))

namespace tetra {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define TETRA_AVX512 1
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TETRA_AVX2 1
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
#ifndef TETRA_AVX512
#define TETRA_AVX512 0
#endif
#ifndef TETRA_AVX2
#define TETRA_AVX2 0
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

template <class To, class From> INLINE To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

template <class Vector> INLINE Vector load(const void* from) {
    Vector value;
    std::memcpy(&value, from, sizeof(Vector));
    return value;
}

template <class Vector> INLINE void store(void* to, Vector value) { std::memcpy(to, &value, sizeof(Vector)); }

INLINE Floats splat(float value) { return Floats{} + value; }

// Lane by lane: `a` where it is the larger, else `b`, also where one is NaN; so NaN in `b` stays.
INLINE Floats largest(Floats a, Floats b) {
#if TETRA_AVX512
    return _mm512_max_ps(a, b);
#elif TETRA_AVX2
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

INLINE Ints largest(Ints a, Ints b) { return a > b ? a : b; }

// Rounded half to even.
INLINE Floats round_to_even(Floats v) {
#if TETRA_AVX512
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT);
#elif TETRA_AVX2
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Floats result;
    for (int i = 0; i < LANES; i++) result[i] = __builtin_rintf(v[i]);
    return result;
#endif
}

template <class Vector> INLINE auto sum_of(Vector v) {
    auto total = v[0];
    for (int i = 1; i < LANES; i++) total += v[i];
    return total;
}

INLINE float sum_of(Floats v) {
#if TETRA_AVX512
    return _mm512_reduce_add_ps(v);
#else
    float total = v[0];
    for (int i = 1; i < LANES; i++) total += v[i];
    return total;
#endif
}

template <class Vector> INLINE auto largest_of(Vector v) {
    auto best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
}

INLINE int32_t largest_of(Ints v) {
#if TETRA_AVX512
    return _mm512_reduce_max_epi32(bits<__m512i>(v));
#else
    int32_t best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

// Rounded half to even; the values have to be within int8's range.
INLINE Bytes round_to_bytes(Floats v) {
#if TETRA_AVX512
    return bits<Bytes>(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
#elif TETRA_AVX2
    return __builtin_convertvector(bits<Ints>(_mm256_cvtps_epi32(v)), Bytes);
#else
    Bytes result;
    for (int i = 0; i < LANES; i++) result[i] = static_cast<int8_t>(__builtin_rintf(v[i]));
    return result;
#endif
}

// --- number formats ----------------------------------------------------------------------------------------

enum Format : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT32 = 3 };

INLINE int64_t bytes_of(int32_t format) { return format == BFLOAT16 || format == FLOAT16 ? 2 : 4; }

struct Float32 {
    typedef float Element;
    static INLINE Floats load(const float* from) { return tetra::load<Floats>(from); }
    static INLINE void store(float* to, Floats v) { tetra::store(to, v); }
    static INLINE Floats round(Floats v) { return v; }
};

struct BFloat16 {
    typedef uint16_t Element;
    static INLINE Floats load(const uint16_t* from) {
        return extend(tetra::load<Halves>(from));
    }
    static INLINE Floats extend(Halves v) { return bits<Floats>(__builtin_convertvector(v, Words) << 16); }
    static INLINE Halves convert(Floats v) {
#if TETRA_AVX512 && defined(__AVX512BF16__)
        return bits<Halves>(_mm512_cvtneps_pbh(v));
#else
        const Words w = bits<Words>(v);
        const Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;  // half to even
        const Words quiet = (w >> 16) | 0x40;                        // NaN stays NaN
        return __builtin_convertvector(v == v ? rounded : quiet, Halves);
#endif
    }
    static INLINE void store(uint16_t* to, Floats v) { tetra::store(to, convert(v)); }
    static INLINE Floats round(Floats v) { return extend(convert(v)); }
};

#if defined(__F16C__) || TETRA_AVX512 || defined(__ARM_FP16_FORMAT_IEEE)
#define TETRA_FLOAT16 1
struct Float16 {
    typedef uint16_t Element;
    static INLINE Floats load(const uint16_t* from) {
#if TETRA_AVX512
        return _mm512_cvtph_ps(tetra::load<__m256i>(from));
#elif TETRA_AVX2
        return _mm256_cvtph_ps(tetra::load<__m128i>(from));
#elif defined(__F16C__)
        return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
        __fp16 values[LANES];
        std::memcpy(values, from, sizeof(values));
        Floats v;
        for (int i = 0; i < LANES; i++) v[i] = values[i];
        return v;
#endif
    }
    static INLINE void store(uint16_t* to, Floats v) {
#if TETRA_AVX512
        tetra::store(to, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif TETRA_AVX2
        tetra::store(to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
        __fp16 values[LANES];
        for (int i = 0; i < LANES; i++) values[i] = v[i];
        std::memcpy(to, values, sizeof(values));
#endif
    }
    static INLINE Floats round(Floats v) {
        uint16_t rounded[LANES];
        store(rounded, v);
        return load(rounded);
    }
};
#endif

// `Type::load` and `store` of the first `n` lanes only; the other lanes are read as zero.
template <class Type> INLINE Floats load_first(const typename Type::Element* from, int64_t n) {
    if (n >= LANES) return Type::load(from);
    typename Type::Element buffer[LANES] = {};
    std::memcpy(buffer, from, n * sizeof(buffer[0]));
    return Type::load(buffer);
}

template <class Type> INLINE void store_first(typename Type::Element* to, Floats v, int64_t n) {
    if (n >= LANES) return Type::store(to, v);
    typename Type::Element buffer[LANES];
    Type::store(buffer, v);
    std::memcpy(to, buffer, n * sizeof(buffer[0]));
}

// Calls `function` with the type of a format: with_type(format, [&](auto type) { using Type = decltype(type); ... }).
template <class Function> INLINE void with_type(int32_t format, Function&& function) {
    if (format == FLOAT32) return function(Float32{});
    if (format == BFLOAT16) return function(BFloat16{});
#if TETRA_FLOAT16
    if (format == FLOAT16) return function(Float16{});
#endif
}

// values[first : first + n] of any format as floats.
inline void to_floats(const void* values, int32_t format, int64_t first, int64_t n, float* to) {
    with_type(format, [&](auto type) {
        using Type = decltype(type);
        const auto* from = static_cast<const typename Type::Element*>(values) + first;
        for (int64_t i = 0; i < n; i += LANES) store_first<Float32>(to + i, load_first<Type>(from + i, n - i), n - i);
    });
}

// --- functions ---------------------------------------------------------------------------------------------

// 2^x with a relative error below 2e-7, for x <= 127; NaN stays NaN. Below -126 it is 0, or no more than 2^-126.
INLINE Floats exp2_of(Floats x) {
#if TETRA_AVX512
    // 2^floor(x) times 2^f for the fraction f in [0, 1): minimax in relative error.
    const Floats f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Floats p = splat(0.0018775780918076634f);
    p = p * f + 0.008989342488348484f;
    p = p * f + 0.05582631006836891f;
    p = p * f + 0.24015362560749054f;
    p = p * f + 0.6931530833244324f;
    p = p * f + 0.9999999403953552f;
    return _mm512_scalef_ps(p, x);
#else
    // The same about the nearest whole number, which the lowest bits of `shifted` hold: f in [-1/2, 1/2].
    x = largest(splat(-126.0f), x);
    const Floats shifted = x + 12582912.0f;  // 1.5 * 2^23
    const Floats f = x - (shifted - 12582912.0f);
    Floats p = splat(0.0013264736626297235f);
    p = p * f + 0.009671516716480255f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
    p = p * f + 1.0f;
    return bits<Floats>(bits<Words>(p) + (bits<Words>(shifted) << 23));
#endif
}

INLINE Floats magnitude_of(Floats x) { return bits<Floats>(bits<Words>(x) & 0x7fffffffu); }

// Q(t) = 1 - Phi(t) for t >= 0, the upper tail of the normal distribution; absolute error below 1e-7 / max(1, t).
//
// log2 Q is so smooth that a polynomial is enough: no branch, no division, nothing that cancels. Fitted on [0, 6]
// for the error of t Q(t); beyond, the negative leading coefficient takes it to 0.
INLINE Floats upper_tail_of(Floats t) {
    Floats p = splat(-2.334945975235314e-06f);
    p = p * t + 3.3737778721842915e-05f;
    p = p * t - 0.0001612936466699466f;
    p = p * t - 0.00019170399173162878f;
    p = p * t + 0.007126865908503532f;
    p = p * t - 0.05253361538052559f;
    p = p * t - 0.4591982960700989f;
    p = p * t - 1.1511059999465942f;
    p = p * t - 1.0f;
    return exp2_of(p);
}

// x Phi(x) = max(x, 0) - |x| Q(|x|), with the exact normal distribution; absolute error below 1e-7 max(1, |x|).
INLINE Floats gelu_of(Floats x) {
    const Floats t = magnitude_of(x);
    return largest(Floats{}, x) - t * upper_tail_of(t);
}

// The same, and its derivative Phi(x) + x phi(x), phi(x) = exp(-x^2 / 2) / sqrt(2 pi).
INLINE Floats gelu_of(Floats x, Floats* slope) {
    const Floats t = magnitude_of(x), tail = upper_tail_of(t);
    const Floats density = exp2_of(t * t * -0.72134752044448170f) * 0.39894228040143268f;
    *slope = (x > 0.0f ? 1.0f - tail : tail) + x * density;
    return largest(Floats{}, x) - t * tail;
}

}  // namespace tetra

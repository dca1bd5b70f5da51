// The functions that tetra/kernels/native.py calls. It has checked the arguments; matrices are row-major, strides
// count elements, formats are those of vectors.hpp. Sources are compiled on the machine that runs them.

#include "attention.hpp"
#include "blend.hpp"
#include "hamming.hpp"
#include "rows.hpp"
#include "ternary.hpp"

extern "C" {

// Which instructions were compiled in.
const char* tetra_instructions() {
#if TETRA_AVX512 && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    return "AVX-512 with VNNI and BF16";
#elif TETRA_AVX512 && defined(__AVX512VNNI__)
    return "AVX-512 with VNNI";
#elif TETRA_AVX512
    return "AVX-512";
#elif TETRA_AVX2 && defined(__AVXVNNI__)
    return "AVX2 with VNNI";
#elif TETRA_AVX2
    return "AVX2";
#elif TETRA_NEON_DOT
    return "NEON with dot products";
#else
    return "portable";
#endif
}

int32_t tetra_has_float16() {
#if TETRA_FLOAT16
    return 1;
#else
    return 0;
#endif
}

void tetra_use_threads_of(void* gomp_parallel) { tetra::fork_join = reinterpret_cast<tetra::ForkJoin>(gomp_parallel); }

void tetra_rows(const void* x, int32_t format, int64_t m, int64_t k, int64_t x_stride, const void* residual,
                int64_t residual_stride, void* total, int32_t gelu, const void* weight, int32_t weight_format,
                const void* bias, int32_t bias_format, float eps, void* out, int8_t* codes, float* scale,
                int64_t rows_a_task, int64_t threads) {
    tetra::run(tetra::Rows{x, format, m, k, x_stride, residual, residual_stride, total, gelu != 0, weight,
                           weight_format, bias, bias_format, eps, out, codes, scale},
               rows_a_task, threads);
}

void tetra_ternary_linear(const int8_t* x, int64_t m, int64_t n, int64_t k, int64_t x_stride, const uint8_t* packed,
                          const float* scale, float weight_scale, const void* bias, int32_t bias_format,
                          const void* residual, int32_t residual_format, int64_t residual_stride, int32_t gelu,
                          int64_t scaled_columns, float column_scale, void* out, int32_t out_format,
                          int64_t block_bytes, int64_t threads) {
    tetra::run(tetra::TernaryLinear{x, m, n, k, x_stride, packed, scale, weight_scale, bias, bias_format, residual,
                                    residual_format, residual_stride, gelu != 0, scaled_columns, column_scale, out,
                                    out_format, block_bytes},
               threads);
}

void tetra_pack_ternary(const float* weight, int64_t n, int64_t k, float factor, uint8_t* packed, int64_t threads) {
    tetra::run(tetra::PackTernary{weight, n, k, factor, packed}, threads);
}

void tetra_attention(const void* qkv, int32_t format, int64_t batch, int64_t tokens, int64_t heads, int64_t dim,
                     int64_t batch_stride, int64_t token_stride, float scale, void* out, int64_t threads) {
    tetra::run(tetra::Attention{qkv, format, batch, tokens, heads, dim, batch_stride, token_stride, scale, out},
               threads);
}

void tetra_attention_backward(const void* qkv, int32_t format, int64_t batch, int64_t tokens, int64_t heads, int64_t dim,
                              int64_t batch_stride, int64_t token_stride, float scale, float logit_scale,
                              const void* grad, void* grad_qkv, int64_t threads) {
    tetra::run(tetra::AttentionBackward{
                   {qkv, format, batch, tokens, heads, dim, batch_stride, token_stride, scale, nullptr},
                   logit_scale, grad, grad_qkv},
               threads);
}

void tetra_blend_rows(const void* x, int32_t format, int64_t m, int64_t k, int32_t gelu, double dropout,
                      int64_t seed, const void* weight, int32_t weight_format, const void* bias, int32_t bias_format,
                      float eps, float lambda, void* out, int32_t out_format, int64_t threads) {
    tetra::run(tetra::BlendRows{{x, format, m, k, gelu != 0, tetra::Dropout(dropout, seed), weight, weight_format,
                                 bias, bias_format, eps},
                                lambda, out, out_format},
               threads);
}

void tetra_blend_rows_backward(const void* x, int32_t format, int64_t m, int64_t k, int32_t gelu, double dropout,
                               int64_t seed, const void* weight, int32_t weight_format, const void* bias,
                               int32_t bias_format, float eps, const void* grad, int32_t grad_format, void* grad_x,
                               float* grad_weight, float* grad_bias, float lambda, void* out, int64_t threads) {
    tetra::run(tetra::BlendRowsBackward{{x, format, m, k, gelu != 0, tetra::Dropout(dropout, seed), weight,
                                         weight_format, bias, bias_format, eps},
                                        grad, grad_format, grad_x, grad_weight, grad_bias, lambda, out},
               threads);
}

void tetra_blend_weight(const void* weight, int32_t format, int64_t n, float lambda, void* out, int32_t out_format,
                        int64_t threads) {
    tetra::run(tetra::BlendWeight{weight, format, n, lambda, out, out_format}, threads);
}

void tetra_hamming_nearest(const uint8_t* queries, int64_t n_queries, int64_t query_stride, const uint8_t* database,
                           int64_t n_rows, int64_t row_stride, int64_t n_bytes, const uint8_t* allowed, int64_t k,
                           int32_t* distances, int64_t* rows, int64_t block_bytes, int64_t threads) {
    tetra::hamming_nearest(
        {queries, n_queries, query_stride, database, n_rows, row_stride, n_bytes, allowed, block_bytes}, k, distances,
        rows, threads);
}

void tetra_hamming_within(const uint8_t* queries, int64_t n_queries, int64_t query_stride, const uint8_t* database,
                          int64_t n_rows, int64_t row_stride, int64_t n_bytes, const uint8_t* allowed, int32_t radius,
                          int64_t* counts, const int64_t* offsets, int32_t* distances, int64_t* rows,
                          int64_t block_bytes, int64_t threads) {
    tetra::hamming_within(
        {queries, n_queries, query_stride, database, n_rows, row_stride, n_bytes, allowed, block_bytes}, radius,
        counts, offsets, distances, rows, threads);
}

void tetra_hamming_all(const uint8_t* queries, int64_t n_queries, int64_t query_stride, const uint8_t* database,
                       int64_t n_rows, int64_t row_stride, int64_t n_bytes, int32_t* out, int64_t block_bytes,
                       int64_t threads) {
    tetra::hamming_all({queries, n_queries, query_stride, database, n_rows, row_stride, n_bytes, nullptr, block_bytes},
                       out, threads);
}

}  // extern "C"

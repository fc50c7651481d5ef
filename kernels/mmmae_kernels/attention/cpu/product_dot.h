// Products of bfloat16 by AVX512-BF16's dot products of pairs. To be included by level_*.cpp only.
#pragma once

#include "product.h"

namespace mmmae::attention {
namespace {

MMMAE_INLINE void begin_products() {}
MMMAE_INLINE void end_products() {}

// Computes M by N tiles of sums = a * b, or adds the product to the sums if begun; depth is a number of tiles.
template <int M, int N> MMMAE_INLINE void product(Left a, Right b, Sums sums, int64_t depth, bool begun) {
    constexpr int R = 8;  // rows whose sums stay in registers
    for (int row = 0; row < TILE * M; row += R) {
        const Bfloat16 *left = a.data + row / TILE * a.row_step + row % TILE * a.stride, *right = b.data;
        float* to = sums.data + row / TILE * sums.row_step + row % TILE * sums.stride;
        __m512 total[R][N];
        MMMAE_UNROLL
        for (int r = 0; r < R; ++r) {
            MMMAE_UNROLL
            for (int n = 0; n < N; ++n) total[r][n] = begun ? load(to + r * sums.stride + n * sums.column_step) : Vec{};
        }
        for (int64_t k = 0; k < depth; ++k) {
            for (int pair = 0; pair < DEPTH; pair += 2) {
                __m512i columns[N];
                MMMAE_UNROLL
                for (int n = 0; n < N; ++n) columns[n] = _mm512_loadu_si512(right + n * b.column_step + pair * TILE);
                MMMAE_UNROLL
                for (int r = 0; r < R; ++r) {
                    int32_t numbers;
                    __builtin_memcpy(&numbers, left + r * a.stride + pair, sizeof numbers);
                    const __m512i both = _mm512_set1_epi32(numbers);
                    MMMAE_UNROLL
                    for (int n = 0; n < N; ++n)
                        total[r][n] = _mm512_dpbf16_ps(total[r][n], (__m512bh)both, (__m512bh)columns[n]);
                }
            }
            left += a.depth_step;
            right += b.depth_step;
        }
        MMMAE_UNROLL
        for (int r = 0; r < R; ++r) {
            MMMAE_UNROLL
            for (int n = 0; n < N; ++n) store(to + r * sums.stride + n * sums.column_step, total[r][n]);
        }
    }
}

}  // namespace
}  // namespace mmmae::attention

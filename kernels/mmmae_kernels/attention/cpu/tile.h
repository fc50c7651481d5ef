// Products of packed matrices in tiles that stay in registers. To be included by level_*.cpp only.
#pragma once

#include "vector.h"

namespace mmmae::attention {
namespace {

// Rows of a tile by its number of vectors: the sums, a row of the right matrix and one broadcast number fill the
// registers.
#if defined(__AVX512F__)
constexpr int MAX_VECTORS = 4;
constexpr int TILE_ROWS[] = {0, 12, 12, 8, 6};
#elif defined(__AVX__)
constexpr int MAX_VECTORS = 2;
constexpr int TILE_ROWS[] = {0, 8, 6};
#else
constexpr int MAX_VECTORS = 2;
constexpr int TILE_ROWS[] = {0, 8, 4};
#endif

// Computes sums[r][v] = start(v) + sum over k of a[k * DEPTH + r * ROW] * b[k * b_step + v * W ..] and passes them to
// finish.
template <int R, int V, int DEPTH, int ROW, class Start, class Finish>
MMMAE_INLINE void tile(const float* a, const float* b, int64_t b_step, int64_t depth, Start start, Finish finish) {
    Vec sums[R][V];
    MMMAE_UNROLL
    for (int r = 0; r < R; ++r) {
        MMMAE_UNROLL
        for (int v = 0; v < V; ++v) sums[r][v] = start(v);
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vec right[V];
        MMMAE_UNROLL
        for (int v = 0; v < V; ++v) right[v] = load(b + v * W);
        MMMAE_UNROLL
        for (int r = 0; r < R; ++r) {
            const Vec left = splat(a[r * ROW]);
            MMMAE_UNROLL
            for (int v = 0; v < V; ++v) sums[r][v] += left * right[v];
        }
        a += DEPTH;
        b += b_step;
    }
    MMMAE_UNROLL
    for (int r = 0; r < R; ++r) finish(r, sums[r]);
}

// A compile-time constant as a function argument.
template <int N> struct Constant {
    static constexpr int value = N;
};

// Calls body(first row, number of rows as a constant) for tiles that cover all rows, a multiple of 4.
template <int V, class Body> MMMAE_INLINE void for_row_tiles(int64_t rows, Body body) {
    constexpr int R = TILE_ROWS[V];
    int64_t row = 0;
    for (; row + R <= rows; row += R) body(row, Constant<R>{});
    if constexpr (R == 12) {
        if (row + 8 <= rows) {
            body(row, Constant<8>{});
            row += 8;
        }
    }
    if constexpr (R != 4) {
        if (row + 4 <= rows) {
            body(row, Constant<4>{});
            row += 4;
        }
    }
    if constexpr (R == 6) {
        if (row < rows) body(row, Constant<2>{});
    }
}

// Calls body(first column, number of vectors as a constant) for tiles that cover all `width` columns, a multiple of W.
template <class Body> MMMAE_INLINE void for_column_tiles(int64_t width, Body body) {
    int64_t column = 0, vectors = width / W;
    if constexpr (MAX_VECTORS == 4) {
        // 5 is divided into 3 + 2, because a tile of 1 would wait for its loads.
        while (vectors >= 4 && vectors != 5) {
            body(column, Constant<4>{});
            column += 4 * W;
            vectors -= 4;
        }
        while (vectors >= 3) {
            body(column, Constant<3>{});
            column += 3 * W;
            vectors -= 3;
        }
    }
    while (vectors >= 2) {
        body(column, Constant<2>{});
        column += 2 * W;
        vectors -= 2;
    }
    if (vectors > 0) body(column, Constant<1>{});
}

}  // namespace
}  // namespace mmmae::attention

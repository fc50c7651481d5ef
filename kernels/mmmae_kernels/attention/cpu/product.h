// Operands of products of bfloat16 in tiles, which product_amx.h and product_dot.h compute. To be included by
// level_*.cpp only.
#pragma once

#include "vector.h"

namespace mmmae::attention {
namespace {

// Left matrices have tiles of 16 rows and a depth of 32; right ones a depth of 32 and 16 columns, where the two numbers
// of an even and an odd depth are neighbours: 16 rows of 16 such pairs, one after the other. All steps are in elements.
constexpr int64_t TILE = 16, DEPTH = 32, RIGHT_TILE = DEPTH * TILE, SUM_TILE = TILE * TILE;

struct Left {
    const Bfloat16* data;
    int64_t row_step, depth_step;  // from a tile to the one below, and to the next in depth
    int64_t stride;                // from a row to the next
};

struct Right {
    const Bfloat16* data;
    int64_t column_step, depth_step;
};

struct Sums {
    float* data;
    int64_t row_step, column_step, stride;
};

}  // namespace
}  // namespace mmmae::attention

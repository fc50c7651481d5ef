// Attention in bfloat16 by the dot products of AVX512-BF16.
#include "product_dot.h"

#include "backward_tiles.h"

namespace mmmae::attention {

const Level<Bfloat16> level_dot{
    "avx512_bf16", QUERIES, STRIP, &forward_tiles_scratch, &backward_tiles_scratch, &forward_tiles, &backward_tiles};

}  // namespace mmmae::attention

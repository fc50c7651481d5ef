// Attention in bfloat16 by the tiles of AMX.
#include "product_amx.h"

#include "backward_tiles.h"

namespace mmmae::attention {

const Level<Bfloat16> level_amx{
    "amx", QUERIES, STRIP, &forward_tiles_scratch, &backward_tiles_scratch, &forward_tiles, &backward_tiles};

}  // namespace mmmae::attention

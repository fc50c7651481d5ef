// Attention in bfloat16 by a model of the tiles of AMX, which runs on every CPU: for the tests.
#define MMMAE_MODEL
#include "product_amx.h"

#include "backward_tiles.h"

namespace mmmae::attention {

const Level<Bfloat16> level_model{
    "amx_model", QUERIES, STRIP, &forward_tiles_scratch, &backward_tiles_scratch, &forward_tiles, &backward_tiles};

}  // namespace mmmae::attention

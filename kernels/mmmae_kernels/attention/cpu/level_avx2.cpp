// Attention compiled for AVX2 with FMA.
#include "backward.h"

namespace mmmae::attention {

const Level level_avx2{"avx2", &forward_scratch, &backward_scratch, &forward, &backward};

}  // namespace mmmae::attention

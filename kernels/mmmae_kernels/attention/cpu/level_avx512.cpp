// Attention compiled for AVX-512.
#include "backward.h"

namespace mmmae::attention {

const Level level_avx512{"avx512", &forward_scratch, &backward_scratch, &forward, &backward};

}  // namespace mmmae::attention

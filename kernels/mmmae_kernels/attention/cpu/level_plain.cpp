// Attention in vectors of the instruction set that the library is built for.
#include "backward.h"

namespace mmmae::attention {

const Level level_plain{"plain", &forward_scratch, &backward_scratch, &forward, &backward};

}  // namespace mmmae::attention

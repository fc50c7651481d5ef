// Attention in vectors of the instruction set that the library is built for.
#include "backward.h"

namespace mmmae::attention {

const Level<float> level_plain{
    "plain", MAX_QUERIES, ROW_STEP, &forward_scratch, &backward_scratch, &forward<float>, &backward<float>};
const Level<Bfloat16> level_plain_widening{
    "plain", MAX_QUERIES, ROW_STEP, &forward_scratch, &backward_scratch, &forward<Bfloat16>, &backward<Bfloat16>};

}  // namespace mmmae::attention

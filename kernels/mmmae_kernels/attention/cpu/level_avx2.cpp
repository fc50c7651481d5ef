// Attention compiled for AVX2 with FMA.
#include "backward.h"

namespace mmmae::attention {

const Level<float> level_avx2{
    "avx2", MAX_QUERIES, ROW_STEP, &forward_scratch, &backward_scratch, &forward<float>, &backward<float>};
const Level<Bfloat16> level_avx2_widening{
    "avx2", MAX_QUERIES, ROW_STEP, &forward_scratch, &backward_scratch, &forward<Bfloat16>, &backward<Bfloat16>};

}  // namespace mmmae::attention

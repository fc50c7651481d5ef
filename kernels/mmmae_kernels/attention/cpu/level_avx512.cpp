// Attention compiled for AVX-512.
#include "backward.h"

namespace mmmae::attention {

const Level<float> level_avx512{
    "avx512", MAX_QUERIES, ROW_STEP, &forward_scratch, &backward_scratch, &forward<float>, &backward<float>};
const Level<Bfloat16> level_avx512_widening{
    "avx512", MAX_QUERIES, ROW_STEP, &forward_scratch, &backward_scratch, &forward<Bfloat16>, &backward<Bfloat16>};

}  // namespace mmmae::attention

#include "cpu/floats.h"
#include "cpu/halves.h"

namespace mmmae {
namespace {

MMMAE_VECTOR void widen_bfloat16(float* __restrict out, const uint16_t* __restrict row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) out[i] = from_bfloat16(row[i]);
}

MMMAE_VECTOR void widen_float16(float* __restrict out, const uint16_t* __restrict row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) out[i] = from_float16(row[i]);
}

MMMAE_VECTOR void narrow_bfloat16(uint16_t* __restrict out, const float* __restrict row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) out[i] = to_bfloat16(row[i]);
}

MMMAE_VECTOR void narrow_float16(uint16_t* __restrict out, const float* __restrict row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) out[i] = to_float16(row[i]);
}

}  // namespace

void widen(float* out, const void* row, int dtype, int64_t width) {
    (dtype == BFLOAT16 ? widen_bfloat16 : widen_float16)(out, static_cast<const uint16_t*>(row), width);
}

void narrow(void* out, const float* row, int dtype, int64_t width) {
    (dtype == BFLOAT16 ? narrow_bfloat16 : narrow_float16)(static_cast<uint16_t*>(out), row, width);
}

}  // namespace mmmae

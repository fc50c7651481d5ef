// Conversions between float, bfloat16 and float16, for loops that the compiler vectorises.
#pragma once

#include <cstdint>
#include <cstring>

namespace mmmae {

inline uint32_t bits_of(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// A bfloat16 is the upper half of a float.
inline float from_bfloat16(uint16_t half) { return float_of(uint32_t{half} << 16); }

inline uint16_t to_bfloat16(float number) {
    const uint32_t bits = bits_of(number), rounded = bits + 0x7fff + (bits >> 16 & 1);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return static_cast<uint16_t>((is_nan ? bits | 0x400000 : rounded) >> 16);
}

constexpr uint32_t REBIAS = (127 - 15) << 23;  // difference of the exponents' biases
constexpr uint32_t MANTISSA_SHIFT = 23 - 10;

// With selects instead of branches, and with no subnormal float on the way, which CPUs may be told to flush.
inline float from_float16(uint16_t half) {
    constexpr uint32_t EXPONENT = 0x7c00 << MANTISSA_SHIFT;
    const uint32_t magnitude = (half & 0x7fffu) << MANTISSA_SHIFT, exponent = magnitude & EXPONENT;
    const uint32_t normal = magnitude + REBIAS + (exponent == EXPONENT ? REBIAS : 0);
    const float subnormal = float_of(magnitude + REBIAS + (1 << 23)) - float_of(REBIAS + (1 << 23));
    return float_of((exponent ? normal : bits_of(subnormal)) | (half & 0x8000u) << 16);
}

inline uint16_t to_float16(float number) {
    constexpr uint32_t INFINITE = 0x7f800000, TOO_LARGE = (127 + 16) << 23, SMALLEST_NORMAL = (127 - 14) << 23;
    const uint32_t sign = bits_of(number) & 0x80000000, magnitude = bits_of(number) ^ sign;
    // Adding 0.5, whose last bit is worth the smallest float16, leaves the rounded number in the lowest bits.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t odd = magnitude >> MANTISSA_SHIFT & 1;
    const uint32_t normal = (magnitude - REBIAS + (1 << (MANTISSA_SHIFT - 1)) - 1 + odd) >> MANTISSA_SHIFT;
    const uint32_t finite = magnitude < SMALLEST_NORMAL ? subnormal : normal;
    const uint32_t special = magnitude > INFINITE ? 0x7e00 : 0x7c00;
    return static_cast<uint16_t>((magnitude < TOO_LARGE ? finite : special) | sign >> 16);
}

// Types of numbers in memory, for kernels that exist once for each.
struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline float to_float(float number) { return number; }
inline float to_float(Bfloat16 number) { return from_bfloat16(number.bits); }
inline float to_float(Float16 number) { return from_float16(number.bits); }

// target = number, rounded as by `narrow`.
inline void assign(float& target, float number) { target = number; }
inline void assign(Bfloat16& target, float number) { target.bits = to_bfloat16(number); }
inline void assign(Float16& target, float number) { target.bits = to_float16(number); }

}  // namespace mmmae

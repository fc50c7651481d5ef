// A vector of floats as wide as the registers of the instruction set. To be included by level_*.cpp only.
#pragma once

#include "head.h"

#include <cstddef>
#include <cstdint>
#include <utility>

#ifdef __SSE__
#include <immintrin.h>
#endif

#define MMMAE_INLINE [[gnu::always_inline]] inline
#define MMMAE_INLINED __attribute__((always_inline))  // for lambdas: a call would spill all registers
#ifdef __clang__
#define MMMAE_UNROLL _Pragma("unroll")
#else
#define MMMAE_UNROLL _Pragma("GCC unroll 64")
#endif

namespace mmmae::attention {
namespace {

#if defined(__AVX512F__) || defined(MMMAE_MODEL)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(W * sizeof(float))));
typedef int32_t Int __attribute__((vector_size(W * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(W * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));

MMMAE_INLINE Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
MMMAE_INLINE void store(float* to, Vec x) { *reinterpret_cast<Unaligned*>(to) = x; }
MMMAE_INLINE Vec splat(float x) { return x - Vec{}; }  // minus zero, because x + 0 would turn -0 into 0

// Bfloat16 is the upper half of a float. Rounding is to the nearest, and of two to the even one; NaN remains NaN.
typedef uint16_t Halves __attribute__((vector_size(W * sizeof(uint16_t))));
typedef uint16_t UnalignedHalves __attribute__((vector_size(W * sizeof(uint16_t)), aligned(2), may_alias));

MMMAE_INLINE Vec load(const Bfloat16* from) {
    const Halves halves = *reinterpret_cast<const UnalignedHalves*>(from);
    return reinterpret_cast<Vec>(__builtin_convertvector(halves, Bits) << 16);
}

MMMAE_INLINE void store(Bfloat16* to, Vec x) {
    const Bits bits = reinterpret_cast<Bits>(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Bits halves = x == x ? rounded : (bits >> 16 | 0x40);
    *reinterpret_cast<UnalignedHalves*>(to) = __builtin_convertvector(halves, Halves);
}

// Returns the larger elements, b if either is NaN. The compiler would make two instructions of the plain expression.
MMMAE_INLINE Vec max(Vec a, Vec b) {
#if defined(MMMAE_MODEL)
    return a > b ? a : b;
#elif defined(__AVX512F__)
    return _mm512_maskz_max_ps(0xffff, a, b);  // for _mm512_max_ps GCC 12 warns of uninitialised memory
#elif defined(__AVX__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// Loads the first `count` < W numbers; the rest are zeros.
template <class T> MMMAE_INLINE Vec load_some(const T* from, int64_t count) {
    T numbers[W] = {};
    for (int i = 0; i < count; ++i) numbers[i] = from[i];
    return load(numbers);
}

template <class T> MMMAE_INLINE void store_some(T* to, Vec x, int64_t count) {
    T numbers[W];
    store(numbers, x);
    for (int i = 0; i < count; ++i) to[i] = numbers[i];
}

template <size_t STEP, size_t... I> MMMAE_INLINE Vec rotate(Vec x, std::index_sequence<I...>) {
#ifdef __clang__
    return __builtin_shufflevector(x, x, ((I + STEP) % W)...);
#else
    return __builtin_shuffle(x, Int{static_cast<int32_t>((I + STEP) % W)...});
#endif
}

// Reduces all lanes by `join`.
template <size_t STEP = W / 2, class Join> MMMAE_INLINE float reduce(Vec x, Join join) {
    x = join(x, rotate<STEP>(x, std::make_index_sequence<W>{}));
    if constexpr (STEP > 1)
        return reduce<STEP / 2>(x, join);
    else
        return x[0];
}

MMMAE_INLINE float sum_of(Vec x) {
    return reduce(x, [](Vec a, Vec b) MMMAE_INLINED { return a + b; });
}

MMMAE_INLINE float max_of(Vec x) {
    return reduce(x, [](Vec a, Vec b) MMMAE_INLINED { return max(a, b); });
}

// Returns a0 b0 a1 b1 ... from the first or the second halves of a and b.
template <int FIRST, size_t... I> MMMAE_INLINE Vec interleave(Vec a, Vec b, std::index_sequence<I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * W)...);
#else
    return __builtin_shuffle(a, b, Int{static_cast<int32_t>(FIRST + I / 2 + I % 2 * W)...});
#endif
}

// Transposes W rows of `width` floats, `from_step` apart and padded to whole vectors, into columns `to_step` apart.
MMMAE_INLINE void transpose_rows(const float* from, int64_t from_step, float* to, int64_t to_step, int64_t width) {
    using Lanes = std::make_index_sequence<W>;
    for (int64_t column = 0; column < width; column += W) {
        Vec x[W], y[W];
        MMMAE_UNROLL
        for (int i = 0; i < W; ++i) x[i] = load(from + i * from_step + column);
        MMMAE_UNROLL
        for (int step = 1; step < W; step *= 2) {
            MMMAE_UNROLL
            for (int i = 0; i < W / 2; ++i) {
                y[2 * i] = interleave<0>(x[i], x[i + W / 2], Lanes{});
                y[2 * i + 1] = interleave<W / 2>(x[i], x[i + W / 2], Lanes{});
            }
            MMMAE_UNROLL
            for (int i = 0; i < W; ++i) x[i] = y[i];
        }
        const int64_t count = width - column;
        if (count >= W) {
            MMMAE_UNROLL
            for (int i = 0; i < W; ++i) store(to + (column + i) * to_step, x[i]);
        } else {
            MMMAE_UNROLL
            for (int i = 0; i < W; ++i)
                if (i < count) store(to + (column + i) * to_step, x[i]);
        }
    }
}

constexpr float LOG2_E = 1.44269504f;

// Returns exp(y) for y < 88 with an error of 2 units in the last place; 0 for y < -87.7. It is 2^n times a polynomial
// for 2^r, a relative minimax fit over [-1/2, 1/2] with 2^0 = 1 and an error of 1.1e-7. GELU's polynomial has one term
// more.
MMMAE_INLINE Vec exponential(Vec y) {
    constexpr float TO_INTEGER = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it leaves n + 127 in the lowest bits
    y = max(splat(-88.1f), y);                          // n = -127, and the power of two is 0
    const Vec shifted = y * LOG2_E + TO_INTEGER, n = shifted - TO_INTEGER, r = y * LOG2_E - n;
    Vec p = 0.00132647273f * r + 0.00967151299f;
    p = p * r + 0.0555073358f;
    p = p * r + 0.240222424f;
    p = p * r + 0.693147004f;
    p = p * r + 1.0f;
    return p * reinterpret_cast<Vec>(reinterpret_cast<Bits>(shifted) << 23);
}

// Returns log x for normal x > 0 with an error of one unit in the last place, NaN for NaN, and something for other x,
// which lanes past the last row hold: hence the unsigned arithmetic. The polynomial is Cephes' logf.
MMMAE_INLINE Vec logarithm(Vec x) {
    constexpr uint32_t ROOT_HALF = 0x3f3504f3;  // bits of sqrt(1/2), the lower end of the reduced range
    const Bits bits = reinterpret_cast<Bits>(x);
    const Int n = reinterpret_cast<Int>(bits - ROOT_HALF) >> 23;
    const Vec t = reinterpret_cast<Vec>(bits - (reinterpret_cast<Bits>(n) << 23)) - 1.0f, square = t * t;
    Vec p = 7.0376836292e-2f * t - 1.1514610310e-1f;
    p = p * t + 1.1676998740e-1f;
    p = p * t - 1.2420140846e-1f;
    p = p * t + 1.4249322787e-1f;
    p = p * t - 1.6668057665e-1f;
    p = p * t + 2.0000714765e-1f;
    p = p * t - 2.4999993993e-1f;
    p = p * t + 3.3333331174e-1f;
    const Vec exponent = __builtin_convertvector(n, Vec);
    const Vec rest = p * t * square - 2.12194440e-4f * exponent - 0.5f * square;
    return exponent * 0.693359375f + (t + rest) + (x - x);
}

}  // namespace
}  // namespace mmmae::attention

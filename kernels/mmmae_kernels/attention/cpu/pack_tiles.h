// Copies of rows of bfloat16 in the order in which products of tiles read them. To be included by level_*.cpp only.
#pragma once

#include "pack.h"
#include "product.h"

namespace mmmae::attention {
namespace {

// A vector of 2 W numbers of bfloat16.
typedef uint16_t WideHalves __attribute__((vector_size(2 * W * sizeof(uint16_t))));
typedef uint16_t UnalignedWide __attribute__((vector_size(2 * W * sizeof(uint16_t)), aligned(2), may_alias));
static_assert(2 * W == DEPTH && W == TILE);

MMMAE_INLINE WideHalves load_wide(const Bfloat16* from) { return *reinterpret_cast<const UnalignedWide*>(from); }
MMMAE_INLINE void store(Bfloat16* to, WideHalves x) { *reinterpret_cast<UnalignedWide*>(to) = x; }

// Rounds two vectors; the second follows the first.
MMMAE_INLINE WideHalves rounded(Vec first, Vec second) {
#ifdef __AVX512BF16__
    return (WideHalves)_mm512_cvtne2ps_pbh(second, first);
#else
    Bfloat16 numbers[2 * W];
    store(numbers, first);
    store(numbers + W, second);
    return load_wide(numbers);
#endif
}

// Returns a0 b0 a1 b1 ... from the first or the second halves of a and b.
template <int FIRST, size_t... I>
MMMAE_INLINE WideHalves interleave(WideHalves a, WideHalves b, std::index_sequence<I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * 2 * W)...);
#else
    return __builtin_shuffle(a, b, WideHalves{static_cast<uint16_t>(FIRST + I / 2 + I % 2 * 2 * W)...});
#endif
}

// Writes the pairs of two rows of DEPTH numbers to the rows of two right tiles.
MMMAE_INLINE void store_interleaved(WideHalves a, WideHalves b, Bfloat16* to, Bfloat16* next) {
    using Lanes = std::make_index_sequence<2 * W>;
    store(to, interleave<0>(a, b, Lanes{}));
    store(next, interleave<W>(a, b, Lanes{}));
}

// Copies a row, with zeros up to `padded` numbers.
MMMAE_INLINE void copy_row(const Bfloat16* from, Bfloat16* to, int64_t width, int64_t padded) {
    int64_t c = 0;
    for (; c + DEPTH <= width; c += DEPTH) store(to + c, load_wide(from + c));
    for (; c < width; ++c) to[c] = from[c];
    for (; c < padded; ++c) to[c] = {};
}

MMMAE_INLINE void clear_rows(Bfloat16* to, int64_t count) {
    for (int64_t i = 0; i < count; i += DEPTH) store(to + i, WideHalves{});
}

// Copies the present keys or values as rows of `step` numbers, with rows of zeros up to `rows`. This is a left matrix.
void copy_rows(const Keys<Bfloat16>& keys, Rows<Bfloat16> from, int64_t rows, int64_t step, Bfloat16* to) {
    for (int64_t i = 0; i < keys.count; ++i)
        copy_row(from.data + number(keys, i) * from.stride, to + i * step, keys.width, step);
    clear_rows(to + keys.count * step, (rows - keys.count) * step);
}

// Makes a right matrix with `count` columns from rows of pairs, as [count / TILE, padded d / DEPTH] tiles.
void transpose_pairs(const Bfloat16* rows, int64_t count, int64_t step, Bfloat16* to) {
    for (int64_t i = 0; i < count; i += TILE)
        transpose_rows(reinterpret_cast<const float*>(rows + i * step), step / 2,
                       reinterpret_cast<float*>(to + i * step), TILE, step / 2);
}

// Makes a right matrix with the depth `count` from rows, as tiles `columns` numbers apart and one after the other in
// depth. `count` is a multiple of DEPTH.
void interleave_rows(const Bfloat16* rows, int64_t count, int64_t width, int64_t columns, Bfloat16* to) {
    for (int64_t i = 0; i < count; i += 2)
        for (int64_t c = 0; c < width; c += DEPTH) {
            Bfloat16* tile = to + c / TILE * columns + i * TILE;
            const Bfloat16* from = rows + i * width + c;
            store_interleaved(load_wide(from), load_wide(from + width), tile, tile + columns);
        }
}

// Makes a left matrix [padded d, count] from the result of `transpose_pairs`, as [count / DEPTH, padded d, DEPTH]
// numbers. `count` is a multiple of DEPTH.
void separate_pairs(const Bfloat16* transposed, int64_t count, int64_t step, Bfloat16* to) {
    const auto* pairs = reinterpret_cast<const float*>(transposed);
    for (int64_t i = 0; i < count; i += DEPTH)
        for (int64_t pair = 0; pair < step / 2; ++pair) {
            Bfloat16* row = to + i * step + 2 * pair * DEPTH;
            for (int64_t half = 0; half < 2; ++half) {
                const Bits bits = reinterpret_cast<Bits>(load(pairs + ((i / TILE + half) * step / 2 + pair) * TILE));
                Bfloat16* to_even = row + half * TILE;
                *reinterpret_cast<UnalignedHalves*>(to_even) = __builtin_convertvector(bits, Halves);
                *reinterpret_cast<UnalignedHalves*>(to_even + DEPTH) = __builtin_convertvector(bits >> 16, Halves);
            }
        }
}

// Writes a row of sums in tiles, multiplied by a factor.
MMMAE_INLINE void unpack_tiles(const float* from, Bfloat16* to, int64_t width, float factor) {
    int64_t c = 0;
    for (; c + TILE <= width; c += TILE) store(to + c, load(from + c * TILE) * factor);
    if (c < width) store_some(to + c, load(from + c * TILE) * factor, width - c);
}

// Returns 2^t for t <= 127 with an error of 1e-4, a twentieth of bfloat16's; 0 for t < -126, because products take
// denormal numbers for zero, and scalef is slow to make them. The polynomial is a relative minimax fit over [0, 1] that
// is exact at both ends.
MMMAE_INLINE Vec power_of_two(Vec t) {
#if defined(__AVX512DQ__) && !defined(MMMAE_MODEL)
    const Vec r = _mm512_maskz_reduce_ps(0xffff, t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    constexpr float TO_INTEGER = 12582912.0f + 127.0f;  // see exponential()
    t = max(splat(-127.0f), t);
    const Vec shifted = t - 0.5f + TO_INTEGER, r = t - (shifted - TO_INTEGER);
#endif
    Vec p = 0.0782679692f * r + 0.226307675f;
    p = p * r + 0.695424318f;
    p = p * r + 1.0f;
#if defined(__AVX512DQ__) && !defined(MMMAE_MODEL)
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, splat(-126.0f), _CMP_NLT_UQ), p, t);  // NaN remains NaN
#else
    return p * reinterpret_cast<Vec>(reinterpret_cast<Bits>(shifted) << 23);
#endif
}

}  // namespace
}  // namespace mmmae::attention

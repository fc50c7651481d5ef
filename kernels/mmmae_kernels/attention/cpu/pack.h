// Copies of queries and keys in the order in which products read them. For the files level_*.cpp alone.
#pragma once

#include "head.h"
#include "vector.h"

namespace mmmae::attention {
namespace {

constexpr int64_t AHEAD = 8;  // rows
constexpr int PANEL = 2 * W;  // keys that a tile of scores is wide

MMMAE_INLINE int64_t padded(int64_t count) { return (count + W - 1) / W * W; }

MMMAE_INLINE void pack_row(const float* from, float* to, int64_t width, float factor) {
    int64_t c = 0;
    for (; c + W <= width; c += W) store(to + c, load(from + c) * factor);
    if (c < width) store(to + c, load_some(from + c, width - c) * factor);
}

// The other way round.
MMMAE_INLINE void unpack_row(const float* from, float* to, int64_t width, float factor) {
    int64_t c = 0;
    for (; c + W <= width; c += W) store(to + c, load(from + c) * factor);
    if (c < width) store_some(to + c, load(from + c) * factor, width - c);
}

// Rows of a head lie pages apart, where no hardware looks ahead.
MMMAE_INLINE void expect_row(Rows rows, int64_t row, int64_t width) {
    for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(rows.data + row * rows.stride + c);
}

MMMAE_INLINE void clear(float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += W) store(to + i, Vec{});
}

MMMAE_INLINE int64_t number(const Keys& keys, int64_t i) { return keys.present ? keys.present[i] : i; }

// The present rows one after the other, `padded(width)` floats each, with rows of zeros up to a whole vector of rows.
MMMAE_INLINE void pack_rows(const Keys& keys, Rows from, float* to) {
    const int64_t step = padded(keys.width);
    for (int64_t i = 0; i < keys.count; ++i)
        pack_row(from.data + number(keys, i) * from.stride, to + i * step, keys.width, 1.0f);
    clear(to + keys.count * step, (padded(keys.count) - keys.count) * step);
}

// Packed rows of keys as columns: panels of PANEL keys, [width, PANEL] each; the last may be [width, W].
MMMAE_INLINE void pack_panels(const float* rows, int64_t count, int64_t width, float* to) {
    const int64_t keys = padded(count), step = padded(width);
    for (int64_t i = 0; i < keys; i += W) {
        const int64_t panel = i / PANEL * PANEL, wide = keys - panel < PANEL ? W : PANEL;
        transpose_rows(rows + i * step, step, to + panel * width + i % PANEL, wide, width);
    }
}

// 0 for each key, minus infinity for those that only pad: what scores begin with.
MMMAE_INLINE void pack_bias(int64_t count, float* to) {
    clear(to, padded(count));
    for (int64_t i = count; i < padded(count); ++i) to[i] = -__builtin_inff();
}

}  // namespace
}  // namespace mmmae::attention

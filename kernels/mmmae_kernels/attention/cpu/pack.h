// Copies of queries, keys and values in the order in which the products read them. To be included by level_*.cpp only.
#pragma once

#include "head.h"
#include "vector.h"

namespace mmmae::attention {
namespace {

constexpr int64_t AHEAD = 8;  // rows to prefetch
constexpr int PANEL = 2 * W;  // keys of a tile of scores

MMMAE_INLINE int64_t padded(int64_t count) { return (count + W - 1) / W * W; }

template <class T> MMMAE_INLINE void pack_row(const T* from, float* to, int64_t width, float factor) {
    int64_t c = 0;
    for (; c + W <= width; c += W) store(to + c, load(from + c) * factor);
    if (c < width) store(to + c, load_some(from + c, width - c) * factor);
}

// Copies a padded row back.
template <class T> MMMAE_INLINE void unpack_row(const float* from, T* to, int64_t width, float factor) {
    int64_t c = 0;
    for (; c + W <= width; c += W) store(to + c, load(from + c) * factor);
    if (c < width) store_some(to + c, load(from + c) * factor, width - c);
}

// Rows of a head are pages apart, so the hardware does not prefetch them.
template <class T> MMMAE_INLINE void prefetch_row(Rows<T> rows, int64_t row, int64_t width) {
    for (int64_t c = 0; c < width; c += 64 / sizeof(T)) __builtin_prefetch(rows.data + row * rows.stride + c);
}

MMMAE_INLINE void clear(float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += W) store(to + i, Vec{});
}

template <class T> MMMAE_INLINE int64_t number(const Keys<T>& keys, int64_t i) { return keys.present ? keys.present[i] : i; }

// Packs the present rows, `padded(width)` floats each, with rows of zeros up to a multiple of W rows.
template <class T> MMMAE_INLINE void pack_rows(const Keys<T>& keys, Rows<T> from, float* to) {
    const int64_t step = padded(keys.width);
    for (int64_t i = 0; i < keys.count; ++i)
        pack_row(from.data + number(keys, i) * from.stride, to + i * step, keys.width, 1.0f);
    clear(to + keys.count * step, (padded(keys.count) - keys.count) * step);
}

// Transposes packed rows of keys into panels [width, PANEL] of PANEL keys; the last panel may be [width, W].
MMMAE_INLINE void pack_panels(const float* rows, int64_t count, int64_t width, float* to) {
    const int64_t keys = padded(count), step = padded(width);
    for (int64_t i = 0; i < keys; i += W) {
        const int64_t panel = i / PANEL * PANEL, wide = keys - panel < PANEL ? W : PANEL;
        transpose_rows(rows + i * step, step, to + panel * width + i % PANEL, wide, width);
    }
}

// Writes the initial scores: 0 for each key, minus infinity for padding.
MMMAE_INLINE void pack_bias(int64_t count, float* to) {
    clear(to, padded(count));
    for (int64_t i = count; i < padded(count); ++i) to[i] = -__builtin_inff();
}

}  // namespace
}  // namespace mmmae::attention

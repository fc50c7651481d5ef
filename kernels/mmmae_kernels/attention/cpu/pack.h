// Copies of queries, keys and values in the order in which the products read them. To be included by level_*.cpp only.
#pragma once

#include "head.h"
#include "vector.h"

namespace mmmae::attention {
namespace {

constexpr int64_t AHEAD = 8;  // rows to prefetch
constexpr int PANEL = 2 * W;  // keys of a tile of scores

MMMAE_INLINE int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
MMMAE_INLINE int64_t padded(int64_t count) { return round_up(count, W); }

// Scratch memory of which `used` floats are taken. Without memory they are only counted.
struct Memory {
    float* data;
    int64_t used;
};

template <class T> MMMAE_INLINE void take(Memory& memory, T*& part, int64_t count) {
    part = memory.data ? reinterpret_cast<T*>(memory.data + memory.used) : nullptr;
    memory.used += count * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(float));
}

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

// Returns the sum of products of two rows; the first one is padded.
template <class A, class B> MMMAE_INLINE float dot(const A* a, const B* b, int64_t width) {
    Vec sum{};
    int64_t c = 0;
    for (; c + W <= width; c += W) sum += load(a + c) * load(b + c);
    if (c < width) sum += load(a + c) * load_some(b + c, width - c);
    return sum_of(sum);
}

// Writes the result of a head without keys: zeros, and log-sum-exps of minus infinity.
template <class T> void forward_without_keys(const Forward<T>& task) {
    for (int64_t row = task.first; row < task.last; ++row) {
        for (int64_t c = 0; c < task.keys.width; ++c) task.out.data[row * task.out.stride + c] = {};
        task.lse[row] = -__builtin_inff();
    }
}

// Rows of a head are pages apart, so the hardware does not prefetch them.
template <class T> MMMAE_INLINE void prefetch_row(Rows<T> rows, int64_t row, int64_t width) {
    for (int64_t c = 0; c < width; c += 64 / sizeof(T)) __builtin_prefetch(rows.data + row * rows.stride + c);
}

MMMAE_INLINE void clear(float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += W) store(to + i, Vec{});
}

template <class T> MMMAE_INLINE int64_t number(const Keys<T>& keys, int64_t i) {
    return keys.present ? keys.present[i] : i;
}

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

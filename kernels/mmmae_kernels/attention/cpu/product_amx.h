// Products of bfloat16 by the tile instructions of AMX, or by a model of them in plain C++ where MMMAE_MODEL is
// defined. To be included by level_*.cpp only.
#pragma once

#include "product.h"

namespace mmmae::attention {
namespace {

// A tile has 16 rows of 64 bytes: 16 floats, or 16 pairs of bfloat16.
#ifdef MMMAE_MODEL

thread_local uint32_t tiles[8][16][16];

MMMAE_INLINE void begin_products() {}
MMMAE_INLINE void end_products() {}

template <int NUMBER> void load_tile(const void* from, int64_t stride) {
    for (int r = 0; r < 16; ++r) __builtin_memcpy(tiles[NUMBER][r], static_cast<const char*>(from) + r * stride, 64);
}

template <int NUMBER> void store_tile(void* to, int64_t stride) {
    for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(to) + r * stride, tiles[NUMBER][r], 64);
}

template <int NUMBER> void clear_tile() { __builtin_memset(tiles[NUMBER], 0, sizeof tiles[NUMBER]); }

// Returns the float with these bits, zero if it is denormal.
MMMAE_INLINE float number_of(uint32_t bits) {
    float x;
    if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

MMMAE_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits;
}

// TDPBF16PS: the products of the first and of the second numbers of the pairs are summed apart, then added.
template <int SUM, int A, int B> void multiply_tiles() {
    for (int m = 0; m < 16; ++m) {
        float first[16] = {}, second[16] = {};
        for (int k = 0; k < 16; ++k) {
            const uint32_t pair = tiles[A][m][k];
            for (int n = 0; n < 16; ++n) {
                first[n] += number_of(pair << 16) * number_of(tiles[B][k][n] << 16);
                second[n] += number_of(pair & 0xffff0000) * number_of(tiles[B][k][n] & 0xffff0000);
            }
        }
        for (int n = 0; n < 16; ++n) tiles[SUM][m][n] = bits_of(number_of(tiles[SUM][m][n]) + (first[n] + second[n]));
    }
}

#else

struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A constant in memory: GCC 12 does not know that the instruction reads all of it.
constexpr TileConfiguration CONFIGURATION;

MMMAE_INLINE void begin_products() { _tile_loadconfig(&CONFIGURATION); }

MMMAE_INLINE void end_products() { _tile_release(); }

// The numbers of tiles must be literals.
template <int NUMBER> MMMAE_INLINE void load_tile(const void* from, int64_t stride) {
    if constexpr (NUMBER == 0) _tile_loadd(0, from, stride);
    if constexpr (NUMBER == 1) _tile_loadd(1, from, stride);
    if constexpr (NUMBER == 2) _tile_loadd(2, from, stride);
    if constexpr (NUMBER == 3) _tile_loadd(3, from, stride);
    if constexpr (NUMBER == 4) _tile_loadd(4, from, stride);
    if constexpr (NUMBER == 5) _tile_loadd(5, from, stride);
    if constexpr (NUMBER == 6) _tile_loadd(6, from, stride);
    if constexpr (NUMBER == 7) _tile_loadd(7, from, stride);
}

template <int NUMBER> MMMAE_INLINE void store_tile(void* to, int64_t stride) {
    if constexpr (NUMBER == 0) _tile_stored(0, to, stride);
    if constexpr (NUMBER == 1) _tile_stored(1, to, stride);
    if constexpr (NUMBER == 2) _tile_stored(2, to, stride);
    if constexpr (NUMBER == 3) _tile_stored(3, to, stride);
}

template <int NUMBER> MMMAE_INLINE void clear_tile() {
    if constexpr (NUMBER == 0) _tile_zero(0);
    if constexpr (NUMBER == 1) _tile_zero(1);
    if constexpr (NUMBER == 2) _tile_zero(2);
    if constexpr (NUMBER == 3) _tile_zero(3);
}

template <int SUM, int A, int B> MMMAE_INLINE void multiply_tiles() {
    if constexpr (SUM == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (SUM == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (SUM == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (SUM == 3) _tile_dpbf16ps(3, 5, 7);
    static_assert(A == 4 + SUM / 2 && B == 6 + SUM % 2);
}

#endif

template <int NUMBER> MMMAE_INLINE void begin_tile(const float* from, int64_t stride, bool begun) {
    if (begun)
        load_tile<NUMBER>(from, stride);
    else
        clear_tile<NUMBER>();
}

// Computes M by N tiles of sums = a * b, or adds the product to the sums if begun; depth is a number of tiles.
template <int M, int N> MMMAE_INLINE void product(Left a, Right b, Sums sums, int64_t depth, bool begun) {
    const int64_t a_stride = a.stride * sizeof(Bfloat16), stride = sums.stride * sizeof(float);
#ifndef MMMAE_MODEL
    __asm__ volatile("" ::: "memory");  // GCC 12 does not know that loads of tiles read memory
#endif
    float *second = sums.data + sums.column_step, *third = sums.data + sums.row_step;
    float* fourth = third + sums.column_step;
    begin_tile<0>(sums.data, stride, begun);
    if constexpr (N == 2) begin_tile<1>(second, stride, begun);
    if constexpr (M == 2) begin_tile<2>(third, stride, begun);
    if constexpr (M == 2 && N == 2) begin_tile<3>(fourth, stride, begun);
    for (int64_t k = 0; k < depth; ++k) {
        load_tile<4>(a.data, a_stride);
        load_tile<6>(b.data, 64);
        multiply_tiles<0, 4, 6>();
        if constexpr (N == 2) {
            load_tile<7>(b.data + b.column_step, 64);
            multiply_tiles<1, 4, 7>();
        }
        if constexpr (M == 2) {
            load_tile<5>(a.data + a.row_step, a_stride);
            multiply_tiles<2, 5, 6>();
        }
        if constexpr (M == 2 && N == 2) multiply_tiles<3, 5, 7>();
        a.data += a.depth_step;
        b.data += b.depth_step;
    }
    store_tile<0>(sums.data, stride);
    if constexpr (N == 2) store_tile<1>(second, stride);
    if constexpr (M == 2) store_tile<2>(third, stride);
    if constexpr (M == 2 && N == 2) store_tile<3>(fourth, stride);
}

}  // namespace
}  // namespace mmmae::attention

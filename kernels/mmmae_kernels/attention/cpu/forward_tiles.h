// Attention of one head of bfloat16 by products of tiles, with a running maximum. To be included by level_*.cpp only.
#pragma once

#include "pack_tiles.h"

namespace mmmae::attention {
namespace {

// Queries are taken by STRIP, keys by KEYS. The strides of rows are odd numbers of cache lines.
constexpr int64_t STRIP = 2 * TILE, KEYS = 512, SCORE_STEP = KEYS + 16, WEIGHT_STEP = KEYS + 32;

// Computes sums = a * b, or adds the product to the sums if begun, of matrices with these numbers of tiles.
void multiply(Left a, Right b, Sums sums, int64_t rows, int64_t columns, int64_t depth, bool begun) {
    for (int64_t i = 0; i < rows; i += 2) {
        for (int64_t j = 0; j < columns; j += 2) {
            const Left left{a.data + i * a.row_step, a.row_step, a.depth_step, a.stride};
            const Right right{b.data + j * b.column_step, b.column_step, b.depth_step};
            const Sums to{sums.data + i * sums.row_step + j * sums.column_step, sums.row_step, sums.column_step,
                          sums.stride};
            const bool two_rows = i + 1 < rows, two_columns = j + 1 < columns;
            if (two_rows && two_columns)
                product<2, 2>(left, right, to, depth, begun);
            else if (two_rows)
                product<2, 1>(left, right, to, depth, begun);
            else if (two_columns)
                product<1, 2>(left, right, to, depth, begun);
            else
                product<1, 1>(left, right, to, depth, begun);
        }
    }
}

struct ForwardScratch {
    Bfloat16 *k, *v;            // right matrices [padded d, keys] and [keys, padded d]
    Bfloat16 *rows, *weights;   // left matrices [keys or STRIP, padded d] and [STRIP, WEIGHT_STEP]
    float *scores, *sums;       // [STRIP, SCORE_STEP], tiles of [STRIP, padded d]
    float *maximum, *total;     // [STRIP]
};

// Divides scratch memory into its parts and returns its size in floats.
int64_t divide(float* data, int64_t keys, int64_t width, ForwardScratch& parts) {
    const int64_t n = round_up(keys, DEPTH), step = round_up(width, DEPTH);
    Memory memory{data, 0};
    take(memory, parts.k, n * step);
    take(memory, parts.v, n * step);
    take(memory, parts.rows, (n < STRIP ? STRIP : n) * step);
    take(memory, parts.weights, STRIP * WEIGHT_STEP);
    take(memory, parts.scores, STRIP * SCORE_STEP);
    take(memory, parts.sums, STRIP * step);
    take(memory, parts.maximum, STRIP);
    take(memory, parts.total, STRIP);
    return memory.used;
}

int64_t forward_tiles_scratch(int64_t keys, int64_t width) {
    ForwardScratch parts;
    return divide(nullptr, keys, width, parts);
}

void pack_keys(const Keys<Bfloat16>& keys, int64_t step, const ForwardScratch& parts) {
    const int64_t n = round_up(keys.count, DEPTH);
    copy_rows(keys, keys.k, n, step, parts.rows);
    transpose_pairs(parts.rows, n, step, parts.k);
    copy_rows(keys, keys.v, n, step, parts.rows);
    interleave_rows(parts.rows, n, step, n * TILE, parts.v);
}

// Returns the largest of a row of scores.
MMMAE_INLINE float highest(const float* scores, int64_t count) {
    Vec first = load(scores), second = load(scores + TILE);
    for (int64_t key = DEPTH; key < count; key += DEPTH) {
        first = max(first, load(scores + key));
        second = max(second, load(scores + key + TILE));
    }
    return max_of(max(first, second));
}

// Writes 2^((score - most) * factor) for a row of scores, and returns the sum. The difference comes first: of large
// products, one would be rounded and the other, in a fused multiply-add, would not.
MMMAE_INLINE float weigh(const float* scores, Bfloat16* weights, int64_t count, float factor, float most) {
    Vec first{}, second{};
    for (int64_t key = 0; key < count; key += DEPTH) {
        const Vec low = power_of_two((load(scores + key) - most) * factor);
        const Vec high = power_of_two((load(scores + key + TILE) - most) * factor);
        store(weights + key, rounded(low, high));
        first += low;
        second += high;
    }
    return sum_of(first + second);
}

// Turns the scores of `rows` queries with `count` keys into weights relative to the running maximum, and updates
// maximum, total and the sums of earlier keys, if begun. Each loop takes all rows, so that none waits for the sum over
// the lanes of another. Scores are multiplied by the scale here.
void weigh_rows(const ForwardScratch& parts, int64_t rows, int64_t count, int64_t step, float factor, bool begun) {
    float before[STRIP] = {}, decay[STRIP];
    for (int64_t i = 0; i < rows; ++i) {
        const float most = highest(parts.scores + i * SCORE_STEP, count);
        before[i] = begun ? parts.maximum[i] : most;
        parts.maximum[i] = begun && !(most > before[i]) ? before[i] : most;
    }
    for (int64_t i = 0; i < STRIP; i += W)
        store(decay + i, power_of_two((load(before + i) - load(parts.maximum + i)) * factor));
    for (int64_t i = 0; i < rows; ++i) {
        const float total =
            weigh(parts.scores + i * SCORE_STEP, parts.weights + i * WEIGHT_STEP, count, factor, parts.maximum[i]);
        parts.total[i] = begun ? parts.total[i] * decay[i] + total : total;
    }
    for (int64_t i = 0; begun && i < rows; ++i) {
        float* sums = parts.sums + i / TILE * TILE * step + i % TILE * TILE;
        for (int64_t c = 0; c < step; c += TILE) store(sums + c * TILE, load(sums + c * TILE) * decay[i]);
    }
}

void forward_tiles(const Forward<Bfloat16>& task, float* scratch) {
    ForwardScratch parts;
    const Keys<Bfloat16>& keys = task.keys;
    divide(scratch, keys.total, keys.width, parts);
    const int64_t width = keys.width, step = round_up(width, DEPTH), padded_keys = round_up(keys.count, DEPTH);
    if (keys.count == 0) {
        forward_without_keys(task);
        return;
    }
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(width));
    if (!task.packed) pack_keys(keys, step, parts);
    begin_products();
    for (int64_t begin = task.first; begin < task.last; begin += STRIP) {
        const int64_t count = task.last - begin < STRIP ? task.last - begin : STRIP;
        const int64_t rows = round_up(count, TILE) / TILE;
        for (int64_t i = 0; i < count; ++i)
            copy_row(task.q.data + (begin + i) * task.q.stride, parts.rows + i * step, width, step);
        clear_rows(parts.rows + count * step, (STRIP - count) * step);
        for (int64_t first = 0; first < keys.count; first += KEYS) {
            const int64_t present = keys.count - first < KEYS ? keys.count - first : KEYS;
            const int64_t block = round_up(present, DEPTH);
            multiply({parts.rows, TILE * step, DEPTH, step}, {parts.k + first * step, TILE * step, RIGHT_TILE},
                     {parts.scores, TILE * SCORE_STEP, TILE, SCORE_STEP}, rows, round_up(present, TILE) / TILE,
                     step / DEPTH, false);
            for (int64_t i = 0; present < block && i < count; ++i)
                for (int64_t key = present; key < block; ++key) parts.scores[i * SCORE_STEP + key] = -__builtin_inff();
            weigh_rows(parts, count, block, step, scale * LOG2_E, first > 0);
            multiply({parts.weights, TILE * WEIGHT_STEP, DEPTH, WEIGHT_STEP},
                     {parts.v + first * TILE, padded_keys * TILE, RIGHT_TILE},
                     {parts.sums, TILE * step, SUM_TILE, TILE}, rows, step / TILE, block / DEPTH, first > 0);
        }
        for (int64_t i = 0; i < count; i += TILE) {
            const Vec lse = load(parts.maximum + i) * scale + logarithm(load(parts.total + i));
            store_some(task.lse + begin + i, lse, count - i < TILE ? count - i : TILE);
        }
        for (int64_t i = 0; i < count; ++i)
            unpack_tiles(parts.sums + i / TILE * TILE * step + i % TILE * TILE,
                         task.out.data + (begin + i) * task.out.stride, width, 1 / parts.total[i]);
    }
    end_products();
}

}  // namespace
}  // namespace mmmae::attention

// Attention of one head with a running maximum. To be included by level_*.cpp only.
#pragma once

#include "pack.h"
#include "tile.h"

namespace mmmae::attention {
namespace {

// Scores of one block of queries with one block of keys are in memory at a time; values are read in smaller blocks,
// which stay in the L1 cache. Row strides are odd numbers of cache lines, so that rows do not map to the same cache
// sets.
constexpr int64_t FORWARD_KEYS = 512, VALUE_KEYS = 128, SCORE_STEP = FORWARD_KEYS + 16;
constexpr int64_t QUERY_STEP = 144, QUERY_ROWS = 128;
constexpr int64_t MAX_QUERIES = 120, ROW_STEP = 12;
static_assert(MAX_QUERIES <= QUERY_ROWS && QUERY_ROWS <= QUERY_STEP);

struct ForwardScratch {
    float *k_panels, *v, *bias;       // [panels, d, PANEL], [padded keys, padded d], [padded keys]
    float *q_columns, *rows;          // [d, QUERY_STEP], [W, padded d]
    float *scores, *sums;             // [QUERY_ROWS, SCORE_STEP], [QUERY_ROWS, padded d]
    float *highest;                   // [QUERY_ROWS, W]
    float *maximum, *total, *decay;   // [QUERY_ROWS]
};

// Divides scratch memory into its parts and returns its size in floats.
int64_t divide(float* data, int64_t keys, int64_t width, ForwardScratch& parts) {
    const int64_t n = round_up(keys, 16), d = round_up(width, 16);  // each part starts at a cache line
    Memory memory{data, 0};
    take(memory, parts.k_panels, n * d);
    take(memory, parts.v, n * d);
    take(memory, parts.bias, n);
    take(memory, parts.q_columns, d * QUERY_STEP);
    take(memory, parts.rows, 16 * d);
    take(memory, parts.scores, QUERY_ROWS * SCORE_STEP);
    take(memory, parts.sums, QUERY_ROWS * d);
    take(memory, parts.highest, QUERY_ROWS * 16);
    take(memory, parts.maximum, QUERY_ROWS);
    take(memory, parts.total, QUERY_ROWS);
    take(memory, parts.decay, QUERY_ROWS);
    return memory.used;
}

int64_t forward_scratch(int64_t keys, int64_t width) {
    ForwardScratch parts;
    return divide(nullptr, keys, width, parts);
}

template <class T> void pack_keys(const Keys<T>& keys, const ForwardScratch& parts) {
    // Panels are made from packed rows, for which the memory of the values is used first.
    pack_rows(keys, keys.k, parts.v);
    pack_panels(parts.v, keys.count, keys.width, parts.k_panels);
    pack_rows(keys, keys.v, parts.v);
    pack_bias(keys.count, parts.bias);
}

// Packs the scaled queries as columns, padded with zeros.
template <class T> void pack_queries(Rows<T> q, int64_t count, int64_t width, const ForwardScratch& parts) {
    const int64_t step = padded(width);
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(width));
    for (int64_t i = 0; i < count; i += W) {
        for (int64_t r = 0; r < W; ++r) {
            if (i + r < count)
                pack_row(q.data + (i + r) * q.stride, parts.rows + r * step, width, scale);
            else
                clear(parts.rows + r * step, step);
        }
        transpose_rows(parts.rows, step, parts.q_columns + i, QUERY_STEP, width);
    }
}

// Computes the scores of all rows with keys first..first+count-1, and the maximum of each row in W parts.
void score(const ForwardScratch& parts, int64_t rows, int64_t first, int64_t count, int64_t width) {
    for (int64_t i = 0; i < rows; ++i) store(parts.highest + i * W, splat(-__builtin_inff()));
    for (int64_t key = 0; key < count; key += PANEL) {
        const float *panel = parts.k_panels + (first + key) * width, *bias = parts.bias + first + key;
        const auto run = [&](auto vectors) MMMAE_INLINED {
            constexpr int V = decltype(vectors)::value;
            for_row_tiles<V>(rows, [&](int64_t row, auto tile_rows) MMMAE_INLINED {
                tile<decltype(tile_rows)::value, V, QUERY_STEP, 1>(
                    parts.q_columns + row, panel, V * W, width,
                    [=](int v) MMMAE_INLINED { return load(bias + v * W); },
                    [=](int r, const Vec* sums) MMMAE_INLINED {
                        float* to = parts.scores + (row + r) * SCORE_STEP + key;
                        float* highest = parts.highest + (row + r) * W;
                        Vec most = load(highest);
                        MMMAE_UNROLL
                        for (int v = 0; v < V; ++v) {
                            store(to + v * W, sums[v]);
                            most = max(sums[v], most);
                        }
                        store(highest, most);
                    });
            });
        };
        if (count - key >= PANEL)
            run(Constant<2>{});
        else
            run(Constant<1>{});
    }
}

// Overwrites scores with the exponentials of their difference from the running maximum, and updates the running sum.
void weigh(const ForwardScratch& parts, int64_t rows, int64_t count, bool begun) {
    for (int64_t row = 0; row < rows; ++row) {
        float* scores = parts.scores + row * SCORE_STEP;
        float highest = max_of(load(parts.highest + row * W));
        if (begun && !(highest > parts.maximum[row])) highest = parts.maximum[row];
        Vec total{};
        for (int64_t key = 0; key < count; key += W) {
            const Vec share = exponential(load(scores + key) - highest);
            store(scores + key, share);
            total += share;
        }
        const float decay = begun ? exponential(splat(parts.maximum[row] - highest))[0] : 0.0f;
        parts.total[row] = begun ? parts.total[row] * decay + sum_of(total) : sum_of(total);
        parts.maximum[row] = highest;
        parts.decay[row] = decay;
    }
}

// sums = sums * decay + weights * values
template <bool BEGUN, bool DECAYED>
MMMAE_INLINE void mix(const ForwardScratch& parts, const float* weights, const float* values, int64_t rows,
                      int64_t count, int64_t step) {
    for_column_tiles(step, [&](int64_t column, auto vectors) MMMAE_INLINED {
        constexpr int V = decltype(vectors)::value;
        for_row_tiles<V>(rows, [&](int64_t row, auto tile_rows) MMMAE_INLINED {
            tile<decltype(tile_rows)::value, V, 1, SCORE_STEP>(
                weights + row * SCORE_STEP, values + column, step, count, [](int) MMMAE_INLINED { return Vec{}; },
                [=](int r, const Vec* sums) MMMAE_INLINED {
                    float* to = parts.sums + (row + r) * step + column;
                    MMMAE_UNROLL
                    for (int v = 0; v < V; ++v) {
                        Vec x = sums[v];
                        if (DECAYED) x += load(to + v * W) * parts.decay[row + r];
                        else if (BEGUN) x += load(to + v * W);
                        store(to + v * W, x);
                    }
                });
        });
    });
}

template <class T> void finish(const Forward<T>& task, const ForwardScratch& parts, int64_t begin, int64_t count) {
    const int64_t width = task.keys.width, step = padded(width);
    for (int64_t i = 0; i < count; i += W) {
        const Vec total = load(parts.total + i), lse = load(parts.maximum + i) + logarithm(total);
        if (count - i >= W)
            store(task.lse + begin + i, lse);
        else
            store_some(task.lse + begin + i, lse, count - i);
        store(parts.decay + i, 1.0f / total);
    }
    for (int64_t i = 0; i < count; ++i)
        unpack_row(parts.sums + i * step, task.out.data + (begin + i) * task.out.stride, width, parts.decay[i]);
}

template <class T> void forward(const Forward<T>& task, float* scratch) {
    ForwardScratch parts;
    const Keys<T>& keys = task.keys;
    divide(scratch, keys.total, keys.width, parts);
    const int64_t width = keys.width, step = padded(width), all = padded(keys.count);
    if (all == 0) {
        forward_without_keys(task);
        return;
    }
    if (!task.packed) pack_keys(keys, parts);
    for (int64_t begin = task.first; begin < task.last; begin += task.block) {
        const int64_t count = task.last - begin < task.block ? task.last - begin : task.block;
        const int64_t rows = round_up(count, 4);
        pack_queries<T>({task.q.data + begin * task.q.stride, task.q.stride}, count, width, parts);
        for (int64_t first = 0; first < all; first += FORWARD_KEYS) {
            const int64_t block = all - first < FORWARD_KEYS ? all - first : FORWARD_KEYS;
            score(parts, rows, first, block, width);
            weigh(parts, rows, block, first > 0);
            for (int64_t key = 0; key < block; key += VALUE_KEYS) {
                const int64_t left = keys.count - first - key, few = left < VALUE_KEYS ? left : VALUE_KEYS;
                const float *weights = parts.scores + key, *values = parts.v + (first + key) * step;
                if (key > 0)
                    mix<true, false>(parts, weights, values, rows, few, step);
                else if (first > 0)
                    mix<true, true>(parts, weights, values, rows, few, step);
                else
                    mix<false, false>(parts, weights, values, rows, few, step);
            }
        }
        finish(task, parts, begin, count);
    }
}

}  // namespace
}  // namespace mmmae::attention

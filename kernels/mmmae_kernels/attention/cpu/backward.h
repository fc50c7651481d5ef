// Gradients of one head, with weights computed again from scores and log-sum-exps. To be included by level_*.cpp only.
#pragma once

#include "forward.h"

namespace mmmae::attention {
namespace {

constexpr int64_t BACKWARD_KEYS = 128, WEIGHT_STEP = BACKWARD_KEYS + 16;

struct BackwardScratch {
    float *k, *grad_k, *grad_v;         // [padded keys, padded d]
    float *k_panels, *v_panels, *bias;  // as in forward
    float *q, *grad, *grad_q;           // [QUERY_ROWS, padded d]
    float *q_columns, *grad_columns;    // [d, QUERY_STEP]
    float *weights, *grad_scores;       // [QUERY_ROWS, WEIGHT_STEP]
    float *lse, *delta;                 // [QUERY_ROWS]
};

int64_t divide(float* data, int64_t keys, int64_t width, BackwardScratch& parts) {
    const int64_t n = round_up(keys, 16), d = round_up(width, 16);
    Memory memory{data, 0};
    take(memory, parts.k, n * d);
    take(memory, parts.k_panels, n * d);
    take(memory, parts.v_panels, n * d);
    take(memory, parts.grad_k, n * d);
    take(memory, parts.grad_v, n * d);
    take(memory, parts.bias, n);
    take(memory, parts.q, QUERY_ROWS * d);
    take(memory, parts.grad, QUERY_ROWS * d);
    take(memory, parts.grad_q, QUERY_ROWS * d);
    take(memory, parts.q_columns, d * QUERY_STEP);
    take(memory, parts.grad_columns, d * QUERY_STEP);
    take(memory, parts.weights, QUERY_ROWS * WEIGHT_STEP);
    take(memory, parts.grad_scores, QUERY_ROWS * WEIGHT_STEP);
    take(memory, parts.lse, QUERY_ROWS);
    take(memory, parts.delta, QUERY_ROWS);
    return memory.used;
}

int64_t backward_scratch(int64_t keys, int64_t width) {
    BackwardScratch parts;
    return divide(nullptr, keys, width, parts);
}

// Packs the queries and gradients of a block as rows and as columns, and computes delta, the sum of grad * out. Padding
// rows and rows without keys become zero with an infinite log-sum-exp, so that all their weights are zero.
template <class T>
void pack_queries(const Backward<T>& task, int64_t begin, int64_t count, const BackwardScratch& parts) {
    const int64_t width = task.keys.width, step = padded(width), rows = padded(count);
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(width));
    for (int64_t i = 0; i < rows; ++i) {
        if (i + AHEAD < count) {
            prefetch_row(task.grad, begin + i + AHEAD, width);
            prefetch_row(task.q, begin + i + AHEAD, width);
            prefetch_row(task.out, begin + i + AHEAD, width);
        }
        float *q = parts.q + i * step, *grad = parts.grad + i * step;
        if (i >= count || task.lse[begin + i] == -__builtin_inff()) {
            clear(q, step);
            clear(grad, step);
            parts.lse[i] = __builtin_inff();
            parts.delta[i] = 0;
            continue;
        }
        pack_row(task.q.data + (begin + i) * task.q.stride, q, width, scale);
        pack_row(task.grad.data + (begin + i) * task.grad.stride, grad, width, 1.0f);
        const T* out = task.out.data + (begin + i) * task.out.stride;
        parts.lse[i] = task.lse[begin + i];
        parts.delta[i] = dot(grad, out, width);
    }
    for (int64_t i = 0; i < rows; i += W) {
        transpose_rows(parts.q + i * step, step, parts.q_columns + i, QUERY_STEP, width);
        transpose_rows(parts.grad + i * step, step, parts.grad_columns + i, QUERY_STEP, width);
    }
}

// Computes start(key) plus the products of all rows with a block of keys, and passes each vector to finish(row, key,
// sum).
template <class Start, class Finish>
MMMAE_INLINE void with_keys(const float* columns, const float* panels, int64_t rows, int64_t count, int64_t width,
                            Start start, Finish finish) {
    for (int64_t key = 0; key < count; key += PANEL) {
        const auto run = [&](auto vectors) MMMAE_INLINED {
            constexpr int V = decltype(vectors)::value;
            for_row_tiles<V>(rows, [&](int64_t row, auto tile_rows) MMMAE_INLINED {
                tile<decltype(tile_rows)::value, V, QUERY_STEP, 1>(
                    columns + row, panels + key * width, V * W, width,
                    [=](int v) MMMAE_INLINED { return start(key + v * W); },
                    [=](int r, const Vec* sums) MMMAE_INLINED {
                        MMMAE_UNROLL
                        for (int v = 0; v < V; ++v) finish(row + r, key + v * W, sums[v]);
                    });
            });
        };
        if (count - key >= PANEL)
            run(Constant<2>{});
        else
            run(Constant<1>{});
    }
}

// Writes to = left * right, or adds it to `to` if begun; left is the block of weights or its transpose.
template <int DEPTH, int ROW>
MMMAE_INLINE void add_product(const float* left, const float* right, float* to, int64_t rows, int64_t depth,
                              int64_t step, bool begun) {
    for_column_tiles(step, [&](int64_t column, auto vectors) MMMAE_INLINED {
        constexpr int V = decltype(vectors)::value;
        for_row_tiles<V>(rows, [&](int64_t row, auto tile_rows) MMMAE_INLINED {
            tile<decltype(tile_rows)::value, V, DEPTH, ROW>(
                left + row * ROW, right + column, step, depth, [](int) MMMAE_INLINED { return Vec{}; },
                [=](int r, const Vec* sums) MMMAE_INLINED {
                    float* sum = to + (row + r) * step + column;
                    MMMAE_UNROLL
                    for (int v = 0; v < V; ++v) store(sum + v * W, begun ? load(sum + v * W) + sums[v] : sums[v]);
                });
        });
    });
}

// Writes packed rows to the present keys and zeros to the others.
template <class T> void unpack_rows(const float* from, const Keys<T>& keys, WritableRows<T> to) {
    const int64_t step = padded(keys.width);
    int64_t next = 0;
    for (int64_t key = 0; key < keys.total; ++key) {
        T* row = to.data + key * to.stride;
        if (next < keys.count && number(keys, next) == key)
            unpack_row(from + next++ * step, row, keys.width, 1.0f);
        else
            for (int64_t c = 0; c < keys.width; ++c) row[c] = {};
    }
}

template <class T> void backward(const Backward<T>& task, float* scratch) {
    BackwardScratch parts;
    const Keys<T>& keys = task.keys;
    divide(scratch, keys.total, keys.width, parts);
    const int64_t width = keys.width, step = padded(width), all = padded(keys.count);
    pack_rows(keys, keys.v, parts.k);
    pack_panels(parts.k, keys.count, width, parts.v_panels);
    pack_rows(keys, keys.k, parts.k);
    pack_panels(parts.k, keys.count, width, parts.k_panels);
    pack_bias(keys.count, parts.bias);
    if (task.queries == 0) {
        clear(parts.grad_k, all * step);
        clear(parts.grad_v, all * step);
    }
    for (int64_t begin = 0; begin < task.queries; begin += task.block) {
        const int64_t count = task.queries - begin < task.block ? task.queries - begin : task.block;
        const int64_t rows = round_up(count, 4);
        pack_queries(task, begin, count, parts);
        if (all == 0) clear(parts.grad_q, rows * step);
        for (int64_t first = 0; first < all; first += BACKWARD_KEYS) {
            const int64_t block = all - first < BACKWARD_KEYS ? all - first : BACKWARD_KEYS;
            const int64_t present = keys.count - first < block ? keys.count - first : block;
            const int64_t tiled = round_up(present, 4);
            float *grad_k = parts.grad_k + first * step, *grad_v = parts.grad_v + first * step;
            const float* bias = parts.bias + first;
            with_keys(
                parts.q_columns, parts.k_panels + first * width, rows, block, width,
                [=](int64_t key) MMMAE_INLINED { return load(bias + key); },
                [=](int64_t row, int64_t key, Vec score) MMMAE_INLINED {
                    store(parts.weights + row * WEIGHT_STEP + key, exponential(score - parts.lse[row]));
                });
            with_keys(
                parts.grad_columns, parts.v_panels + first * width, rows, block, width,
                [](int64_t) MMMAE_INLINED { return Vec{}; },
                [=](int64_t row, int64_t key, Vec grad) MMMAE_INLINED {
                    const int64_t at = row * WEIGHT_STEP + key;
                    store(parts.grad_scores + at, load(parts.weights + at) * (grad - parts.delta[row]));
                });
            add_product<WEIGHT_STEP, 1>(parts.weights, parts.grad, grad_v, tiled, count, step, begin > 0);
            add_product<WEIGHT_STEP, 1>(parts.grad_scores, parts.q, grad_k, tiled, count, step, begin > 0);
            const float* k = parts.k + first * step;
            add_product<1, WEIGHT_STEP>(parts.grad_scores, k, parts.grad_q, rows, present, step, first > 0);
        }
        const float scale = 1 / __builtin_sqrtf(static_cast<float>(width));
        for (int64_t i = 0; i < count; ++i)
            unpack_row(parts.grad_q + i * step, task.grad_q.data + (begin + i) * task.grad_q.stride, width, scale);
    }
    unpack_rows(parts.grad_k, keys, task.grad_k);
    unpack_rows(parts.grad_v, keys, task.grad_v);
}

}  // namespace
}  // namespace mmmae::attention

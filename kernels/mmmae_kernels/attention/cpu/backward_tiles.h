// Gradients of one head of bfloat16 by products of tiles, with weights computed again from scores and log-sum-exps. To
// be included by level_*.cpp only.
//
// Scores are computed transposed, [keys, queries]: so they are, rounded, the left matrix for the gradients of keys and
// values, and in pairs the right one for the transposed gradient of the queries.
#pragma once

#include "forward_tiles.h"

namespace mmmae::attention {
namespace {

constexpr int64_t QUERIES = 128;  // of a block

struct BackwardScratch {
    Bfloat16 *k, *v, *k_transposed;      // left matrices [keys, padded d] and [padded d, keys]
    float *grad_k, *grad_v;              // tiles of [keys, padded d]
    Bfloat16 *rows;                      // [QUERIES, padded d]
    Bfloat16 *q_columns, *grad_columns;  // right matrices [padded d, QUERIES]
    Bfloat16 *q, *grad;                  // right matrices [QUERIES, padded d]
    float *scores, *grad_weights;        // tiles of [STRIP, STRIP]
    Bfloat16 *weights, *grad_scores;     // left matrices [STRIP, QUERIES], as [QUERIES / STRIP, STRIP, STRIP]
    Bfloat16 *grad_pairs;                // right matrix [KEYS, QUERIES]
    float *grad_q, *columns;             // tiles of [padded d, QUERIES], and of [TILE, padded d]
    float *lse, *delta;                  // [QUERIES]
};

int64_t divide(float* data, int64_t keys, int64_t width, BackwardScratch& parts) {
    const int64_t n = round_up(keys, DEPTH), step = round_up(width, DEPTH), block = n < KEYS ? n : KEYS;
    Memory memory{data, 0};
    take(memory, parts.k, n * step);
    take(memory, parts.v, n * step);
    take(memory, parts.k_transposed, n * step);
    take(memory, parts.grad_k, n * step);
    take(memory, parts.grad_v, n * step);
    take(memory, parts.rows, QUERIES * step);
    take(memory, parts.q_columns, QUERIES * step);
    take(memory, parts.grad_columns, QUERIES * step);
    take(memory, parts.q, QUERIES * step);
    take(memory, parts.grad, QUERIES * step);
    take(memory, parts.scores, STRIP * STRIP);
    take(memory, parts.grad_weights, STRIP * STRIP);
    take(memory, parts.weights, STRIP * QUERIES);
    take(memory, parts.grad_scores, STRIP * QUERIES);
    take(memory, parts.grad_pairs, block * QUERIES);
    take(memory, parts.grad_q, step * QUERIES);
    take(memory, parts.columns, TILE * step);
    take(memory, parts.lse, QUERIES);
    take(memory, parts.delta, QUERIES);
    return memory.used;
}

int64_t backward_tiles_scratch(int64_t keys, int64_t width) {
    BackwardScratch parts;
    return divide(nullptr, keys, width, parts);
}

// Packs `count` queries and gradients as both right matrices, and computes delta, the sum of grad * out. Padding rows
// and rows without keys become zero with an infinite log-sum-exp, so that all their weights are zero.
void pack_queries(const Backward<Bfloat16>& task, int64_t begin, int64_t count, int64_t step,
                  const BackwardScratch& parts) {
    const int64_t width = task.keys.width, rows = round_up(count, DEPTH);
    const auto pack = [&](Rows<Bfloat16> from, Bfloat16* columns, Bfloat16* pairs) {
        for (int64_t i = 0; i < count; ++i) {
            if (task.lse[begin + i] == -__builtin_inff())
                clear_rows(parts.rows + i * step, step);
            else
                copy_row(from.data + (begin + i) * from.stride, parts.rows + i * step, width, step);
        }
        clear_rows(parts.rows + count * step, (rows - count) * step);
        transpose_pairs(parts.rows, rows, step, columns);
        interleave_rows(parts.rows, rows, step, QUERIES * TILE, pairs);
    };
    pack(task.q, parts.q_columns, parts.q);
    pack(task.grad, parts.grad_columns, parts.grad);
    for (int64_t i = 0; i < rows; ++i) {
        parts.lse[i] = __builtin_inff();
        parts.delta[i] = 0;
        if (i >= count || task.lse[begin + i] == -__builtin_inff()) continue;
        const Bfloat16 *out = task.out.data + (begin + i) * task.out.stride, *grad = parts.rows + i * step;
        parts.lse[i] = task.lse[begin + i];
        parts.delta[i] = dot(grad, out, width);
    }
}

// Returns a * b, rounded: the compiler makes no fused multiply-add of it. Forward has rounded the largest score to the
// log-sum-exp, and of large scores the same one has to differ from it by nothing.
MMMAE_INLINE Vec rounded_product(Vec a, float b) {
    Vec product = a * b;
#ifdef __AVX512F__
    __asm__("" : "+v"(product));
#else
    __asm__("" : "+m"(product));
#endif
    return product;
}

// Computes weights and gradients of scores of a strip of keys, of which `count` are no padding, and a strip of queries.
// There are TILES tiles of queries.
template <int TILES>
MMMAE_INLINE void score_gradients(const BackwardScratch& parts, int64_t query, int64_t count, float scale,
                                  Bfloat16* pairs) {
    Vec lse[2] = {}, delta[2] = {};
    for (int t = 0; t < TILES; ++t) {
        lse[t] = load(parts.lse + query + t * TILE);
        delta[t] = load(parts.delta + query + t * TILE);
    }
    Bfloat16 *weights = parts.weights + query * STRIP, *grad_scores = parts.grad_scores + query * STRIP;
    const auto row = [&](int64_t key) MMMAE_INLINED {
        const int64_t at = key / TILE * 2 * SUM_TILE + key % TILE * TILE;
        if (key >= count) {
            store(weights + key * STRIP, WideHalves{});
            store(grad_scores + key * STRIP, WideHalves{});
            return WideHalves{};
        }
        Vec share[2] = {}, grad[2] = {};
        MMMAE_UNROLL
        for (int t = 0; t < TILES; ++t) {
            const Vec score = rounded_product(load(parts.scores + at + t * SUM_TILE), scale);
            share[t] = power_of_two((score - lse[t]) * LOG2_E);
            grad[t] = share[t] * (load(parts.grad_weights + at + t * SUM_TILE) - delta[t]);
        }
        const WideHalves halves = rounded(grad[0], grad[1]);
        store(weights + key * STRIP, rounded(share[0], share[1]));
        store(grad_scores + key * STRIP, halves);
        return halves;
    };
    for (int64_t key = 0; key < STRIP; key += 2) {
        const WideHalves even = row(key), odd = row(key + 1);
        store_interleaved(even, odd, pairs + key * TILE, pairs + RIGHT_TILE + key * TILE);
    }
}

// Writes the rows of present keys from tiles, multiplied by a factor, and zeros to the others.
void unpack_keys(const float* from, const Keys<Bfloat16>& keys, int64_t step, WritableRows<Bfloat16> to, float factor) {
    int64_t next = 0;
    for (int64_t key = 0; key < keys.total; ++key) {
        Bfloat16* row = to.data + key * to.stride;
        if (from && next < keys.count && number(keys, next) == key) {
            unpack_tiles(from + next / TILE * TILE * step + next % TILE * TILE, row, keys.width, factor);
            ++next;
        } else {
            for (int64_t c = 0; c < keys.width; ++c) row[c] = {};
        }
    }
}

void backward_tiles(const Backward<Bfloat16>& task, float* scratch) {
    BackwardScratch parts;
    const Keys<Bfloat16>& keys = task.keys;
    divide(scratch, keys.total, keys.width, parts);
    const int64_t width = keys.width, step = round_up(width, DEPTH), padded_keys = round_up(keys.count, DEPTH);
    if (keys.count == 0 || task.queries == 0) {
        for (int64_t i = 0; i < task.queries; ++i)
            for (int64_t c = 0; c < width; ++c) task.grad_q.data[i * task.grad_q.stride + c] = {};
        unpack_keys(nullptr, keys, step, task.grad_k, 0);
        unpack_keys(nullptr, keys, step, task.grad_v, 0);
        return;
    }
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(width));
    copy_rows(keys, keys.k, padded_keys, step, parts.k);
    transpose_pairs(parts.k, padded_keys, step, parts.v);  // the memory of the values is used first
    separate_pairs(parts.v, padded_keys, step, parts.k_transposed);
    copy_rows(keys, keys.v, padded_keys, step, parts.v);
    begin_products();
    for (int64_t begin = 0; begin < task.queries; begin += task.block) {
        const int64_t count = task.queries - begin < task.block ? task.queries - begin : task.block;
        const int64_t strips = round_up(count, STRIP) / STRIP;
        pack_queries(task, begin, count, step, parts);
        for (int64_t first = 0; first < keys.count; first += KEYS) {
            const int64_t present = keys.count - first < KEYS ? keys.count - first : KEYS;
            for (int64_t key = 0; key < present; key += STRIP) {
                const int64_t real = present - key < STRIP ? present - key : STRIP, tiles = round_up(real, TILE) / TILE;
                const int64_t row = (first + key) * step;
                Bfloat16* pairs = parts.grad_pairs + key * QUERIES;
                for (int64_t query = 0; query < count; query += STRIP, pairs += 2 * RIGHT_TILE) {
                    const int64_t columns = count - query > TILE ? 2 : 1;
                    multiply({parts.k + row, TILE * step, DEPTH, step},
                             {parts.q_columns + query * step, TILE * step, RIGHT_TILE},
                             {parts.scores, 2 * SUM_TILE, SUM_TILE, TILE}, tiles, columns, step / DEPTH, false);
                    multiply({parts.v + row, TILE * step, DEPTH, step},
                             {parts.grad_columns + query * step, TILE * step, RIGHT_TILE},
                             {parts.grad_weights, 2 * SUM_TILE, SUM_TILE, TILE}, tiles, columns, step / DEPTH, false);
                    if (columns == 2)
                        score_gradients<2>(parts, query, real, scale, pairs);
                    else
                        score_gradients<1>(parts, query, real, scale, pairs);
                }
                const auto add = [&](const Bfloat16* left, const Bfloat16* right, float* sums) {
                    multiply({left, TILE * STRIP, STRIP * STRIP, STRIP}, {right, QUERIES * TILE, RIGHT_TILE},
                             {sums + row, TILE * step, SUM_TILE, TILE}, tiles, step / TILE, strips, begin > 0);
                };
                add(parts.weights, parts.grad, parts.grad_v);
                add(parts.grad_scores, parts.q, parts.grad_k);
            }
            multiply({parts.k_transposed + first * step, TILE * DEPTH, DEPTH * step, DEPTH},
                     {parts.grad_pairs, RIGHT_TILE, QUERIES * DEPTH},
                     {parts.grad_q, QUERIES * TILE, SUM_TILE, TILE}, step / TILE, round_up(count, TILE) / TILE,
                     round_up(present, DEPTH) / DEPTH, first > 0);
        }
        for (int64_t i = 0; i < count; i += TILE) {
            for (int64_t c = 0; c < step; c += TILE)
                transpose_rows(parts.grad_q + c * QUERIES + i * TILE, TILE, parts.columns + c * TILE, TILE, TILE);
            for (int64_t r = 0; r < TILE && i + r < count; ++r)
                unpack_tiles(parts.columns + r * TILE, task.grad_q.data + (begin + i + r) * task.grad_q.stride, width,
                             scale);
        }
    }
    end_products();
    unpack_keys(parts.grad_k, keys, step, task.grad_k, scale);
    unpack_keys(parts.grad_v, keys, step, task.grad_v, 1);
}

}  // namespace
}  // namespace mmmae::attention

// Input sequence of the decoder: visible tokens in their places among mask tokens, plus positions; and its gradients.
#include "cpu/floats.h"
#include "cpu/rows.h"

#include <nanobind/stl/array.h>

#include <algorithm>
#include <vector>

namespace mmmae {
namespace {

// Number of tokens whose position gradients stay in the core's caches during a loop over the samples.
constexpr int64_t CACHED_TOKENS = 16;

MMMAE_VECTOR void pass_masked(const float* __restrict grad, float* __restrict mask_token, float* __restrict position,
                              int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        mask_token[i] += grad[i];
        position[i] += grad[i];
    }
}

// Returns whether each visible row is named exactly once, as in a permutation, so that its gradient is a copy.
bool each_named_once(const Ids& ids, int64_t batch, int64_t tokens, int64_t keep) {
    std::vector<uint8_t> named(keep);
    for (int64_t b = 0; b < batch; ++b) {
        std::fill(named.begin(), named.end(), 0);
        int64_t count = 0;
        for (int64_t n = 0; n < tokens; ++n) {
            const int64_t id = *ids.at(b, n);
            if (id >= keep) continue;
            if (named[id]) return false;
            named[id] = 1;
            ++count;
        }
        if (count < keep) return false;
    }
    return true;
}

}  // namespace

static void decoder_tokens(Address visible_address, Sizes<2> visible_strides, Address mask_token_address,
                           Address ids_address, Sizes<2> ids_strides, Address position_address, int64_t position_stride,
                           Address out_address, Dtypes<3> dtypes, Sizes<4> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t batch = sizes[0], keep = sizes[1], tokens = sizes[2], width = sizes[3];
    const Input visible(visible_address, visible_strides, dtypes[0], width);
    const Input position(position_address, {0, position_stride}, dtypes[1], width);
    const Ids ids(ids_address, ids_strides);
    const auto* mask_token = pointer<const float>(mask_token_address);
    check_ids("ids_restore", ids, batch, tokens, tokens);
    const Output out(out_address, dtypes[2], width);
    const Buffers buffers(any_half(dtypes), threads, 3, width);
    const int64_t rows = batch * tokens;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / tokens, n = row % tokens, id = *ids.at(b, n);
        const float* token = id < keep ? visible.row(b, id, buffers[0]) : mask_token;
        float* sum = out.row(row, buffers[2]);
        add(sum, token, position.row(0, n, buffers[1]), width);
        out.store(row, sum);
    }
}

static void decoder_tokens_backward(Address grad_address, Sizes<2> grad_strides, Address ids_address,
                                    Sizes<2> ids_strides, Address grad_visible_address, Address grad_mask_token_address,
                                    Address grad_position_address, int dtype, Sizes<4> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t batch = sizes[0], keep = sizes[1], tokens = sizes[2], width = sizes[3];
    const Input grad(grad_address, grad_strides, dtype, width);
    const Ids ids(ids_address, ids_strides);
    check_ids("ids_restore", ids, batch, tokens, tokens);
    const Output visible(grad_visible_address, dtype, width), position(grad_position_address, dtype, width);

    const bool copies = each_named_once(ids, batch, tokens, keep);
    const int64_t parts = ColumnSums::parts(batch * tokens);
    ColumnSums masked(parts, width);
    const Buffers buffers(dtype != FLOAT32, threads, CACHED_TOKENS + 1, width);
    const Buffers visible_sums(!copies && !visible.in_place(), threads, keep, width);
    const bool parallel = batch * tokens * width >= PARALLEL_ELEMENTS;
#pragma omp parallel num_threads(threads) if (parallel)
    {
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t end = tokens * (part + 1) / parts;
            masked.begin(part);
            for (int64_t first = tokens * part / parts, last; first < end; first = last) {
                last = std::min(first + CACHED_TOKENS, end);
                const auto sum = [&](int64_t n) { return position.row(n, buffers[n - first]); };
                for (int64_t n = first; n < last; ++n) std::fill_n(sum(n), width, 0.0f);
                for (int64_t b = 0; b < batch; ++b)
                    for (int64_t n = first; n < last; ++n) {
                        const int64_t id = *ids.at(b, n);
                        const float* from = grad.row(b, n, buffers[CACHED_TOKENS]);
                        if (id >= keep) {
                            pass_masked(from, masked.recent(part), sum(n), width);
                        } else {
                            if (copies) std::copy_n(grad.at(b, n), width * size_of(dtype), visible.at(b * keep + id));
                            accumulate(sum(n), from, width);
                        }
                    }
                for (int64_t n = first; n < last; ++n) position.store(n, sum(n));
            }
        }
        if (!copies) {
#pragma omp for schedule(dynamic)
            for (int64_t b = 0; b < batch; ++b) {
                const auto sum = [&](int64_t k) { return visible.row(b * keep + k, visible_sums[k]); };
                for (int64_t k = 0; k < keep; ++k) std::fill_n(sum(k), width, 0.0f);
                for (int64_t n = 0; n < tokens; ++n) {
                    const int64_t id = *ids.at(b, n);
                    if (id < keep) accumulate(sum(id), grad.row(b, n, buffers[0]), width);
                }
                for (int64_t k = 0; k < keep; ++k) visible.store(b * keep + k, sum(k));
            }
        }
    }
    masked.store(pointer<float>(grad_mask_token_address));
}

void bind_decoder_tokens(nb::module_& module) {
    module.def("decoder_tokens", &decoder_tokens, nb::arg("visible"), nb::arg("visible_strides"), nb::arg("mask_token"),
               nb::arg("ids_restore"), nb::arg("ids_strides"), nb::arg("position"), nb::arg("position_stride"),
               nb::arg("out"), nb::arg("dtypes"), nb::arg("sizes"), nb::arg("threads"));
    module.def("decoder_tokens_backward", &decoder_tokens_backward, nb::arg("grad"), nb::arg("grad_strides"),
               nb::arg("ids_restore"), nb::arg("ids_strides"), nb::arg("grad_visible"), nb::arg("grad_mask_token"),
               nb::arg("grad_position"), nb::arg("dtype"), nb::arg("sizes"), nb::arg("threads"));
}

}  // namespace mmmae

// Input sequence of the decoder: visible tokens in their places among mask tokens, plus positions; and its gradients.
#include "cpu/arrays.h"
#include "cpu/rows.h"

#include <nanobind/stl/array.h>

#include <algorithm>
#include <vector>

namespace mmmae {
namespace {

// Number of tokens whose position gradients stay in the core's caches during a loop over the samples.
constexpr int64_t CACHED_TOKENS = 16;

MMMAE_VECTOR void pass_visible(const float* __restrict grad, float* __restrict visible, float* __restrict position,
                               int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        visible[i] = grad[i];
        position[i] += grad[i];
    }
}

MMMAE_VECTOR void pass_masked(const float* __restrict grad, float* __restrict mask_token, float* __restrict position,
                              int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        mask_token[i] += grad[i];
        position[i] += grad[i];
    }
}

// Where the gradient of a token goes: to the mask token, or to a visible row. The first token of a row is copied to it,
// further ones are added later, in order.
enum Role : uint8_t { MASKED, FIRST, AGAIN };

struct Roles {
    std::vector<Role> role;      // [B, N]
    std::vector<uint8_t> named;  // [B, K]
    bool all_once = true;

    Roles(const Ids& ids, int64_t batch, int64_t tokens, int64_t keep) : role(batch * tokens), named(batch * keep) {
        int64_t rows = 0;
        auto next = role.begin();
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t n = 0; n < tokens; ++n, ++next) {
                const int64_t id = *ids.at(b, n);
                if (id >= keep) continue;
                uint8_t& before = named[b * keep + id];
                *next = before ? AGAIN : FIRST;
                rows += 1 - before;
                all_once &= !before;
                before = 1;
            }
        all_once &= rows == static_cast<int64_t>(named.size());
    }
};

}  // namespace

static void decoder_tokens(Address visible_address, Sizes<2> visible_strides, Address mask_token_address,
                           Address ids_address, Sizes<2> ids_strides, Address position_address, int64_t position_stride,
                           Address out_address, Sizes<4> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t batch = sizes[0], keep = sizes[1], tokens = sizes[2], width = sizes[3];
    const Rows visible(visible_address, visible_strides);
    const Ids ids(ids_address, ids_strides);
    const auto *mask_token = pointer<const float>(mask_token_address), *position = pointer<const float>(position_address);
    check_ids("ids_restore", ids, batch, tokens, tokens);
    auto* out = pointer<float>(out_address);
    const int64_t rows = batch * tokens;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / tokens, n = row % tokens, id = *ids.at(b, n);
        add(out + row * width, id < keep ? visible.at(b, id) : mask_token, position + n * position_stride, width);
    }
}

static void decoder_tokens_backward(Address grad_address, Sizes<2> grad_strides, Address ids_address,
                                    Sizes<2> ids_strides, Address grad_visible_address, Address grad_mask_token_address,
                                    Address grad_position_address, Sizes<4> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t batch = sizes[0], keep = sizes[1], tokens = sizes[2], width = sizes[3];
    const Rows grad(grad_address, grad_strides);
    const Ids ids(ids_address, ids_strides);
    check_ids("ids_restore", ids, batch, tokens, tokens);
    auto *visible = pointer<float>(grad_visible_address), *position = pointer<float>(grad_position_address);

    const Roles roles(ids, batch, tokens, keep);
    const int64_t parts = ColumnSums::parts(batch * tokens);
    ColumnSums masked(parts, width);
    const bool parallel = batch * tokens * width >= PARALLEL_ELEMENTS;
#pragma omp parallel num_threads(threads) if (parallel)
    {
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t end = tokens * (part + 1) / parts;
            masked.begin(part);
            for (int64_t first = tokens * part / parts, last; first < end; first = last) {
                last = std::min(first + CACHED_TOKENS, end);
                std::fill(position + first * width, position + last * width, 0.0f);
                for (int64_t b = 0; b < batch; ++b)
                    for (int64_t n = first; n < last; ++n) {
                        const float* from = grad.at(b, n);
                        float* sum = position + n * width;
                        switch (roles.role[b * tokens + n]) {
                            case MASKED: pass_masked(from, masked.recent(part), sum, width); break;
                            case FIRST: pass_visible(from, visible + (b * keep + *ids.at(b, n)) * width, sum, width); break;
                            case AGAIN: accumulate(sum, from, width); break;
                        }
                    }
            }
        }
        if (!roles.all_once) {
#pragma omp for schedule(dynamic)
            for (int64_t b = 0; b < batch; ++b) {
                float* rows = visible + b * keep * width;
                for (int64_t k = 0; k < keep; ++k)
                    if (!roles.named[b * keep + k]) std::fill(rows + k * width, rows + (k + 1) * width, 0.0f);
                for (int64_t n = 0; n < tokens; ++n)
                    if (roles.role[b * tokens + n] == AGAIN) accumulate(rows + *ids.at(b, n) * width, grad.at(b, n), width);
            }
        }
    }
    masked.store(pointer<float>(grad_mask_token_address));
}

void bind_decoder_tokens(nb::module_& module) {
    module.def("decoder_tokens", &decoder_tokens, nb::arg("visible"), nb::arg("visible_strides"), nb::arg("mask_token"),
               nb::arg("ids_restore"), nb::arg("ids_strides"), nb::arg("position"), nb::arg("position_stride"),
               nb::arg("out"), nb::arg("sizes"), nb::arg("threads"));
    module.def("decoder_tokens_backward", &decoder_tokens_backward, nb::arg("grad"), nb::arg("grad_strides"),
               nb::arg("ids_restore"), nb::arg("ids_strides"), nb::arg("grad_visible"), nb::arg("grad_mask_token"),
               nb::arg("grad_position"), nb::arg("sizes"), nb::arg("threads"));
}

}  // namespace mmmae

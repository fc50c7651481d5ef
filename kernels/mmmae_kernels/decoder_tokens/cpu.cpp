// The decoder's input, visible tokens back in place among mask tokens, position added; and the gradients of all three.
#include "cpu/arrays.h"
#include "cpu/rows.h"

#include <algorithm>
#include <vector>

namespace mmmae {
namespace {

// Tokens whose position gradients stay in the core's caches while the samples pass.
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

// What a token's gradient is for. Its row is copied where it is the first token that names the row; the others are added
// later, in order.
enum Role : uint8_t { MASKED, FIRST, AGAIN };

struct Roles {
    std::vector<Role> role;      // [B, N]
    std::vector<uint8_t> named;  // [B, K]
    bool all_once = true;

    Roles(const Ids& ids, int64_t keep) : role(ids.shape[0] * ids.shape[1]), named(ids.shape[0] * keep) {
        int64_t rows = 0;
        auto next = role.begin();
        for (int64_t b = 0; b < ids.shape[0]; ++b)
            for (int64_t n = 0; n < ids.shape[1]; ++n, ++next) {
                const int64_t id = *ids.row(b, n);
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

void check_keep(int64_t keep, const Ids& ids) {
    if (keep > ids.shape[1])
        fail("visible: " + std::to_string(keep) + " tokens, allowed are at most the " + std::to_string(ids.shape[1]) +
             " of " + ids.name);
    check_ids(ids, ids.shape[1]);
}

}  // namespace

static void decoder_tokens(const Input& visible_array, const Input& mask_array, const Input& ids_array,
                           const Input& position_array, const Output& out_array, int threads) {
    const auto visible = view<const float, 3>("visible", visible_array, "[B, K, D]");
    const auto mask_token = view<const float, 1>("mask_token", mask_array, "[D]");
    const auto ids = view<const int64_t, 2>("ids_restore", ids_array, "[B, N]");
    const auto position = view<const float, 2>("position", position_array, "[N, D]");
    const auto out = view<float, 3>("out", out_array, "[B, N, D]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t batch = visible.shape[0], keep = visible.shape[1], width = visible.shape[2], tokens = ids.shape[1];
    mask_token.require_shape({width});
    ids.require_shape({batch, tokens});
    position.require_shape({tokens, width});
    out.require_shape({batch, tokens, width});
    visible.require_dense_rows();
    mask_token.require_dense_rows();
    position.require_dense_rows();
    out.require_contiguous();
    check_keep(keep, ids);
    const int64_t rows = batch * tokens;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / tokens, n = row % tokens, id = *ids.row(b, n);
        add(out.data + row * width, id < keep ? visible.row(b, id) : mask_token.data, position.row(n), width);
    }
}

static void decoder_tokens_backward(const Input& grad_array, const Input& ids_array, const Output& visible_array,
                                    const Output& mask_array, const Output& position_array, int threads) {
    const auto grad = view<const float, 3>("grad", grad_array, "[B, N, D]");
    const auto ids = view<const int64_t, 2>("ids_restore", ids_array, "[B, N]");
    const auto visible = view<float, 3>("grad_visible", visible_array, "[B, K, D]");
    const auto mask_token = view<float, 1>("grad_mask_token", mask_array, "[D]");
    const auto position = view<float, 2>("grad_position", position_array, "[N, D]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t batch = grad.shape[0], tokens = grad.shape[1], width = grad.shape[2], keep = visible.shape[1];
    ids.require_shape({batch, tokens});
    visible.require_shape({batch, keep, width});
    mask_token.require_shape({width});
    position.require_shape({tokens, width});
    grad.require_dense_rows();
    visible.require_contiguous();
    mask_token.require_contiguous();
    position.require_contiguous();
    check_keep(keep, ids);

    const Roles roles(ids, keep);
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
                std::fill(position.row(first), position.row(last), 0.0f);
                for (int64_t b = 0; b < batch; ++b)
                    for (int64_t n = first; n < last; ++n) {
                        const float* from = grad.row(b, n);
                        switch (roles.role[b * tokens + n]) {
                            case MASKED: pass_masked(from, masked.recent(part), position.row(n), width); break;
                            case FIRST: pass_visible(from, visible.row(b, *ids.row(b, n)), position.row(n), width); break;
                            case AGAIN: accumulate(position.row(n), from, width); break;
                        }
                    }
            }
        }
        if (!roles.all_once) {
#pragma omp for schedule(dynamic)
            for (int64_t b = 0; b < batch; ++b) {
                for (int64_t k = 0; k < keep; ++k)
                    if (!roles.named[b * keep + k]) std::fill(visible.row(b, k), visible.row(b, k) + width, 0.0f);
                for (int64_t n = 0; n < tokens; ++n)
                    if (roles.role[b * tokens + n] == AGAIN)
                        accumulate(visible.row(b, *ids.row(b, n)), grad.row(b, n), width);
            }
        }
    }
    masked.store(mask_token.data);
}

void bind_decoder_tokens(nb::module_& module) {
    module.def("decoder_tokens", &decoder_tokens, nb::arg("visible"), nb::arg("mask_token"), nb::arg("ids_restore"),
               nb::arg("position"), nb::arg("out"), nb::arg("threads"));
    module.def("decoder_tokens_backward", &decoder_tokens_backward, nb::arg("grad"), nb::arg("ids_restore"),
               nb::arg("grad_visible"), nb::arg("grad_mask_token"), nb::arg("grad_position"), nb::arg("threads"));
}

}  // namespace mmmae

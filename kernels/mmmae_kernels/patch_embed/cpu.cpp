// Gather of 3D patches by token number, one row a patch, and its reverse, which adds rows back into a volume.
#include "cpu/arrays.h"

#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>

namespace mmmae {
namespace {

using Patch = std::tuple<int64_t, int64_t, int64_t>;
template <typename T> using Volume = View<T, 5>;  // [B, C, T, H, W]
template <typename T> using Rows = View<T, 2>;    // [B*K, C*pt*ph*pw]

struct Patches {
    int64_t pt, ph, pw;  // sizes of one
    int64_t gt, gh, gw;  // how many along each axis
    int64_t channels;

    int64_t tokens() const { return gt * gh * gw; }
    int64_t elements() const { return channels * pt * ph * pw; }
};

template <typename T> Patches cut(const Volume<T>& volume, const Patch& patch) {
    const auto [pt, ph, pw] = patch;
    const int64_t sizes[3] = {pt, ph, pw};
    for (int i = 0; i < 3; ++i) {
        if (sizes[i] < 1) fail("patch: " + to_string(sizes, 3) + " given, expected are sizes of at least 1");
        const int64_t size = volume.shape[2 + i];
        if (size < 1 || size % sizes[i])
            fail(std::string(volume.name) + ": " + "THW"[i] + " is " + std::to_string(size) +
                 ", expected is a positive multiple of the patch's " + std::to_string(sizes[i]));
    }
    if (volume.shape[1] < 1) fail(std::string(volume.name) + ": C is 0, expected is at least one channel");
    return {pt, ph, pw, volume.shape[2] / pt, volume.shape[3] / ph, volume.shape[4] / pw, volume.shape[1]};
}

void check(const Patches& p, const Ids& ids, int64_t batch, int threads) {
    check_threads(threads);
    ids.require_shape({batch, ids.shape[1]});
    check_ids(ids, p.tokens());
}

// The first element of patch `id` of sample `b`.
template <typename T> T* corner(const Volume<T>& volume, const Patches& p, int64_t b, int64_t id) {
    const int64_t t = id / (p.gh * p.gw), h = id / p.gw % p.gh, w = id % p.gw;
    return volume.data + b * volume.stride[0] + t * p.pt * volume.stride[2] + h * p.ph * volume.stride[3] +
           w * p.pw * volume.stride[4];
}

// Calls run(offset in the volume, offset in the row) for each of a patch's lines of pw elements, in the row's order.
template <typename T, typename Run> void for_each_line(const Volume<T>& volume, const Patches& p, Run run) {
    int64_t column = 0;
    for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t i = 0; i < p.pt; ++i)
            for (int64_t j = 0; j < p.ph; ++j, column += p.pw)
                run(c * volume.stride[1] + i * volume.stride[2] + j * volume.stride[3], column);
}

// Calls body with the line's length as a constant where it is a common one, so that a copy becomes a few vector moves.
template <typename Body> void with_length(int64_t length, Body body) {
    switch (length) {
        case 8: return body(std::integral_constant<int64_t, 8>());
        case 14: return body(std::integral_constant<int64_t, 14>());
        case 16: return body(std::integral_constant<int64_t, 16>());
        case 32: return body(std::integral_constant<int64_t, 32>());
        default: return body(length);
    }
}

template <typename T>
void gather(const Volume<const T>& volume, const Ids& ids, const Patches& p, float* out, int threads) {
    const int64_t keep = ids.shape[1], rows = ids.shape[0] * keep, elements = p.elements();
    const int64_t stride = volume.stride[4];
    with_length(p.pw, [&](auto length) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * elements >= PARALLEL_ELEMENTS)
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t b = row / keep;
            const int64_t id = *ids.row(b, row % keep);
            const T* source = corner(volume, p, b, id);
            float* target = out + row * elements;
            if (stride == 1)
                for_each_line(volume, p, [&](int64_t from, int64_t to) {
                    if constexpr (std::is_same_v<T, float>)
                        std::memcpy(target + to, source + from, length * sizeof(float));
                    else
                        for (int64_t x = 0; x < length; ++x) target[to + x] = source[from + x];
                });
            else
                for_each_line(volume, p, [&](int64_t from, int64_t to) {
                    for (int64_t x = 0; x < length; ++x) target[to + x] = source[from + x * stride];
                });
        }
    });
}

// Tasks own disjoint ranges of a sample's tokens, hence disjoint elements, and each adds its rows in the order of ids: no
// two threads write one element, and the sum of a repeated id does not depend on the number of threads.
void scatter(const Rows<const float>& rows, const Ids& ids, const Patches& p, const Volume<float>& volume, int threads) {
    const int64_t batch = ids.shape[0], keep = ids.shape[1], tokens = p.tokens(), elements = p.elements();
    if (batch * keep == 0) return;
    const int64_t parts = std::min(tokens, (4 * threads + batch - 1) / batch);
    const int64_t stride = rows.stride[1];
    with_length(p.pw, [&](auto length) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (batch * keep * elements >= PARALLEL_ELEMENTS)
        for (int64_t task = 0; task < batch * parts; ++task) {
            const int64_t b = task / parts, part = task % parts;
            const int64_t first = tokens * part / parts, last = tokens * (part + 1) / parts;
            for (int64_t k = 0; k < keep; ++k) {
                const int64_t id = *ids.row(b, k);
                if (id < first || id >= last) continue;
                const float* source = rows.data + (b * keep + k) * rows.stride[0];
                float* target = corner(volume, p, b, id);
                for_each_line(volume, p, [&](int64_t to, int64_t from) {
                    for (int64_t x = 0; x < length; ++x) target[to + x] += source[(from + x) * stride];
                });
            }
        }
    });
}

}  // namespace

template <typename T>
static void gather_from(const Input& volume_array, const Input& ids_array, const Patch& patch, const Output& out_array,
                        int threads) {
    const auto volume = view<const T, 5>("volume", volume_array, "[B, C, T, H, W]");
    const auto ids = view<const int64_t, 2>("ids", ids_array, "[B, K]");
    const auto out = view<float, 2>("out", out_array, "[B*K, C*pt*ph*pw]");
    const Patches p = cut(volume, patch);
    nb::gil_scoped_release release;
    check(p, ids, volume.shape[0], threads);
    out.require_shape({ids.shape[0] * ids.shape[1], p.elements()});
    out.require_contiguous();
    gather(volume, ids, p, out.data, threads);
}

static void gather_patches(const Input& volume, const Input& ids, const Patch& patch, const Output& out, int threads) {
    const auto dtype = volume.dtype();
    if (dtype == nb::dtype<uint8_t>()) return gather_from<uint8_t>(volume, ids, patch, out, threads);
    if (dtype == nb::dtype<int16_t>()) return gather_from<int16_t>(volume, ids, patch, out, threads);
    gather_from<float>(volume, ids, patch, out, threads);
}

static void scatter_patches(const Input& rows_array, const Input& ids_array, const Patch& patch,
                            const Output& volume_array, int threads) {
    const auto rows = view<const float, 2>("grad_rows", rows_array, "[B*K, C*pt*ph*pw]");
    const auto ids = view<const int64_t, 2>("ids", ids_array, "[B, K]");
    const auto volume = view<float, 5>("out_volume", volume_array, "[B, C, T, H, W]");
    const Patches p = cut(volume, patch);
    nb::gil_scoped_release release;
    check(p, ids, volume.shape[0], threads);
    rows.require_shape({ids.shape[0] * ids.shape[1], p.elements()});
    volume.require_contiguous();
    scatter(rows, ids, p, volume, threads);
}

void bind_patch_embed(nb::module_& module) {
    module.def("gather_patches", &gather_patches, nb::arg("volume"), nb::arg("ids"), nb::arg("patch"), nb::arg("out"),
               nb::arg("threads"));
    module.def("scatter_patches", &scatter_patches, nb::arg("grad_rows"), nb::arg("ids"), nb::arg("patch"),
               nb::arg("out_volume"), nb::arg("threads"));
}

}  // namespace mmmae

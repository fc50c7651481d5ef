// Gather of 3D patches by token number, one row a patch, and its transpose, which adds rows to a volume.
#include "cpu/floats.h"

#include <nanobind/stl/array.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace mmmae {
namespace {

template <typename T> using Volume = View<T, 5>;  // [B, C, T, H, W]

struct Patches {
    int64_t pt, ph, pw;  // sizes of a patch
    int64_t gt, gh, gw;  // number of patches along each axis
    int64_t channels;

    // The patch sizes divide those of the volume.
    Patches(const Sizes<5>& sizes, const Sizes<3>& patch)
        : pt(patch[0]), ph(patch[1]), pw(patch[2]), gt(sizes[2] / pt), gh(sizes[3] / ph), gw(sizes[4] / pw),
          channels(sizes[1]) {}

    int64_t tokens() const { return gt * gh * gw; }
    int64_t elements() const { return channels * pt * ph * pw; }
};

// Returns the first element of patch `id` of sample `b`.
template <typename T> T* corner(const Volume<T>& volume, const Patches& p, int64_t b, int64_t id) {
    const int64_t t = id / (p.gh * p.gw), h = id / p.gw % p.gh, w = id % p.gw;
    return volume.data + b * volume.stride[0] + t * p.pt * volume.stride[2] + h * p.ph * volume.stride[3] +
           w * p.pw * volume.stride[4];
}

// Calls run(offset in the volume, offset in the row) for each line of pw elements of a patch, in the order of the row.
template <typename T, typename Run> void for_each_line(const Volume<T>& volume, const Patches& p, Run run) {
    int64_t column = 0;
    for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t i = 0; i < p.pt; ++i)
            for (int64_t j = 0; j < p.ph; ++j, column += p.pw)
                run(c * volume.stride[1] + i * volume.stride[2] + j * volume.stride[3], column);
}

// Calls body with the length of a line, as a constant for common lengths, so that a copy becomes a few vector moves.
template <typename Body> void with_length(int64_t length, Body body) {
    switch (length) {
        case 8: return body(std::integral_constant<int64_t, 8>());
        case 14: return body(std::integral_constant<int64_t, 14>());
        case 16: return body(std::integral_constant<int64_t, 16>());
        case 32: return body(std::integral_constant<int64_t, 32>());
        default: return body(length);
    }
}

// Writes each patch to target(number of its row), where E is the type of a row, then calls finish(number, target).
template <typename E, typename T, typename Target, typename Finish>
void gather(const Volume<const T>& volume, const Ids& ids, const Patches& p, int64_t batch, int64_t keep, int threads,
            Target target, Finish finish) {
    const int64_t rows = batch * keep, elements = p.elements();
    const int64_t stride = volume.stride[4];
    with_length(p.pw, [&](auto length) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * elements >= PARALLEL_ELEMENTS)
        for (int64_t number = 0; number < rows; ++number) {
            const int64_t b = number / keep;
            const T* source = corner(volume, p, b, *ids.at(b, number % keep));
            E* row = target(number);
            if (stride == 1)
                for_each_line(volume, p, [&](int64_t from, int64_t to) {
                    if constexpr (std::is_same_v<T, E>)
                        std::memcpy(row + to, source + from, length * sizeof(E));
                    else
                        for (int64_t x = 0; x < length; ++x) row[to + x] = source[from + x];
                });
            else
                for_each_line(volume, p, [&](int64_t from, int64_t to) {
                    for (int64_t x = 0; x < length; ++x) row[to + x] = source[from + x * stride];
                });
            finish(number, row);
        }
    });
}

// Each task owns a range of a sample's tokens and adds its rows in the order of ids: no two threads write to the same
// element, and the sum over a repeated id does not depend on the number of threads.
void scatter(const View<const float, 2>& rows, const Ids& ids, const Patches& p, int64_t batch, int64_t keep,
             const Volume<float>& volume, int threads) {
    const int64_t tokens = p.tokens(), elements = p.elements();
    if (batch * keep == 0) return;
    const int64_t parts = std::min(tokens, (4 * threads + batch - 1) / batch);
    const int64_t stride = rows.stride[1];
    with_length(p.pw, [&](auto length) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (batch * keep * elements >= PARALLEL_ELEMENTS)
        for (int64_t task = 0; task < batch * parts; ++task) {
            const int64_t b = task / parts, part = task % parts;
            const int64_t first = tokens * part / parts, last = tokens * (part + 1) / parts;
            for (int64_t k = 0; k < keep; ++k) {
                const int64_t id = *ids.at(b, k);
                if (id < first || id >= last) continue;
                const float* source = rows.at(b * keep + k, 0);
                float* target = corner(volume, p, b, id);
                for_each_line(volume, p, [&](int64_t to, int64_t from) {
                    for (int64_t x = 0; x < length; ++x) target[to + x] += source[(from + x) * stride];
                });
            }
        }
    });
}

}  // namespace

static void gather_patches(Address volume_address, Sizes<5> volume_strides, Sizes<5> volume_sizes, Address ids_address,
                           Sizes<2> ids_strides, int64_t keep, Sizes<3> patch, Address out_address, Dtypes<2> dtypes,
                           int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const Ids ids(ids_address, ids_strides);
    const Patches p(volume_sizes, patch);
    const int64_t batch = volume_sizes[0], elements = p.elements();
    check_ids("ids", ids, batch, keep, p.tokens());
    const int from = dtypes[0], to = dtypes[1];
    if (from != to && to > FLOAT16)
        fail("dtypes are " + std::to_string(from) + " and " + std::to_string(to) +
             ", expected twice the same, or a second one of 0..2");
    const Output out(out_address, to, elements);
    const Buffers buffers(from != to, threads, 2, elements);
    const auto copy = [&](auto type) {
        using T = decltype(type);
        const Volume<const T> volume(volume_address, volume_strides);
        const auto target = [&](int64_t row) { return reinterpret_cast<T*>(out.at(row)); };
        gather<T>(volume, ids, p, batch, keep, threads, target, [](int64_t, const T*) {});
    };
    const auto convert = [&](auto type) {
        const Volume<const decltype(type)> volume(volume_address, volume_strides);
        const auto target = [&](int64_t row) { return out.row(row, buffers[0]); };
        const auto finish = [&](int64_t row, const float* numbers) { out.store(row, numbers); };
        gather<float>(volume, ids, p, batch, keep, threads, target, finish);
    };
    const auto convert_halves = [&] {
        const Volume<const uint16_t> volume(volume_address, volume_strides);
        const auto target = [&](int64_t) { return reinterpret_cast<uint16_t*>(buffers[1]); };
        const auto finish = [&](int64_t row, const uint16_t* halves) {
            float* numbers = out.row(row, buffers[0]);
            widen(numbers, halves, from, elements);
            out.store(row, numbers);
        };
        gather<uint16_t>(volume, ids, p, batch, keep, threads, target, finish);
    };
    if (from == to) switch (size_of(from)) {
            case 1: return copy(uint8_t());
            case 2: return copy(uint16_t());
            default: return copy(float());
        }
    switch (from) {
        case FLOAT32: return convert(float());
        case INT16: return convert(int16_t());
        case UINT8: return convert(uint8_t());
        default: return convert_halves();
    }
}

static void scatter_patches(Address rows_address, Sizes<2> rows_strides, Address ids_address, Sizes<2> ids_strides,
                            int64_t keep, Sizes<3> patch, Address volume_address, Sizes<5> volume_sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const View<const float, 2> rows(rows_address, rows_strides);
    const Ids ids(ids_address, ids_strides);
    const Patches p(volume_sizes, patch);
    const int64_t batch = volume_sizes[0], width = volume_sizes[4], plane = volume_sizes[3] * width;
    const int64_t channel = volume_sizes[2] * plane;
    const Volume<float> volume(volume_address, {volume_sizes[1] * channel, channel, plane, width, 1});
    check_ids("ids", ids, batch, keep, p.tokens());
    scatter(rows, ids, p, batch, keep, volume, threads);
}

void bind_patch_embed(nb::module_& module) {
    module.def("gather_patches", &gather_patches, nb::arg("volume"), nb::arg("volume_strides"), nb::arg("volume_sizes"),
               nb::arg("ids"), nb::arg("ids_strides"), nb::arg("keep"), nb::arg("patch"), nb::arg("out"),
               nb::arg("dtypes"), nb::arg("threads"));
    module.def("scatter_patches", &scatter_patches, nb::arg("grad_rows"), nb::arg("grad_rows_strides"), nb::arg("ids"),
               nb::arg("ids_strides"), nb::arg("keep"), nb::arg("patch"), nb::arg("out_volume"),
               nb::arg("volume_sizes"), nb::arg("threads"));
}

}  // namespace mmmae

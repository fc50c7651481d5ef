#include "cpu/rows.h"

#include "cpu/floats.h"

#include <nanobind/stl/array.h>

#include <algorithm>

namespace mmmae {

MMMAE_VECTOR float sum(const float* __restrict row, int64_t width) {
    return sum_of(width, [=](int64_t i) { return row[i]; });
}

MMMAE_VECTOR float squares(const float* __restrict row, float mean, int64_t width) {
    return sum_of(width, [=](int64_t i) { return (row[i] - mean) * (row[i] - mean); });
}

MMMAE_VECTOR void add(float* __restrict out, const float* __restrict a, const float* __restrict b, int64_t width) {
    for (int64_t i = 0; i < width; ++i) out[i] = a[i] + b[i];
}

MMMAE_VECTOR void accumulate(float* __restrict sum, const float* __restrict row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) sum[i] += row[i];
}

MMMAE_VECTOR static void accumulate(double* __restrict sum, const float* __restrict row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) sum[i] += row[i];
}

int64_t ColumnSums::parts(int64_t rows) { return std::clamp<int64_t>(rows / (2 * ROWS), 1, PARTS); }

void ColumnSums::begin(int64_t part) {
    float* recent = sums_.get() + 2 * part * width_;
    std::fill(recent, recent + 2 * width_, 0.0f);
}

void ColumnSums::flush(int64_t part) {
    float* recent = sums_.get() + 2 * part * width_;
    accumulate(recent + width_, recent, width_);
    std::fill(recent, recent + width_, 0.0f);
    rows_[part] = 0;
}

void ColumnSums::store(float* out) {
    for (int64_t part = 0; part < parts_; ++part) {
        flush(part);
        accumulate(total_.data(), sums_.get() + (2 * part + 1) * width_, width_);
    }
    std::copy(total_.begin(), total_.end(), out);
}

static void sum_of_rows(Address rows_address, Sizes<2> strides, Address out_address, int dtype, Sizes<3> sizes,
                        int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t inner = sizes[1], count = sizes[0] * inner, width = sizes[2];
    const Input rows(rows_address, strides, dtype, width);
    const Buffers buffers(dtype != FLOAT32, threads, 1, width);
    const int64_t parts = ColumnSums::parts(count);
    ColumnSums sums(parts, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count * width >= PARALLEL_ELEMENTS)
    for (int64_t part = 0; part < parts; ++part) {
        sums.begin(part);
        for (int64_t r = count * part / parts; r < count * (part + 1) / parts; ++r)
            accumulate(sums.recent(part), rows.row(r / inner, r % inner, buffers[0]), width);
    }
    sums.store(pointer<float>(out_address));
}

void bind_rows(nb::module_& module) {
    module.def("sum_of_rows", &sum_of_rows, nb::arg("rows"), nb::arg("rows_strides"), nb::arg("out"), nb::arg("dtype"),
               nb::arg("sizes"), nb::arg("threads"));
}

}  // namespace mmmae

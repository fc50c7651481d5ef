// Residual add and layer norm over the last axis, and the gradients of both.
#include "cpu/arrays.h"
#include "cpu/rows.h"

#include <nanobind/stl/array.h>

#include <cmath>
#include <vector>

namespace mmmae {
namespace {

// out = a + (b + c), and its sum.
MMMAE_VECTOR float add_and_sum(float* __restrict out, const float* __restrict a, const float* __restrict b,
                               const float* __restrict c, int64_t width) {
    return sum_of(width, [=](int64_t i) { return out[i] = a[i] + (b[i] + c[i]); });
}

MMMAE_VECTOR void normalise(float* __restrict out, const float* __restrict row, float mean, float rstd,
                            const float* __restrict weight, const float* __restrict bias, int64_t width) {
    for (int64_t i = 0; i < width; ++i) out[i] = (row[i] - mean) * rstd * weight[i] + bias[i];
}

struct Sums {
    float scaled, times_normalised;  // of grad * weight, and of that times the normalised row
};

MMMAE_VECTOR Sums sums_of(const float* __restrict grad, const float* __restrict row, float mean, float rstd,
                          const float* __restrict weight, int64_t width) {
    const float scaled = sum_of(width, [=](int64_t i) { return grad[i] * weight[i]; });
    const float times_normalised = sum_of(width, [=](int64_t i) { return grad[i] * weight[i] * ((row[i] - mean) * rstd); });
    return {scaled, times_normalised};
}

MMMAE_VECTOR void gradients(float* __restrict grad_row, float* __restrict grad_weight, float* __restrict grad_bias,
                            const float* __restrict grad, const float* __restrict row, float mean, float rstd,
                            const float* __restrict weight, const float* __restrict added, Sums sums, int64_t width) {
    const float first = sums.scaled / static_cast<float>(width), second = sums.times_normalised / static_cast<float>(width);
    for (int64_t i = 0; i < width; ++i) {
        const float normalised = (row[i] - mean) * rstd;
        grad_row[i] = rstd * (grad[i] * weight[i] - first - normalised * second) + added[i];
        grad_weight[i] += grad[i] * normalised;
        grad_bias[i] += grad[i];
    }
}

}  // namespace

static void add_layer_norm(Address x_address, Sizes<2> x_strides, Address residual_address, Sizes<2> residual_strides,
                           Address residual_bias_address, Address weight_address, Address bias_address, float epsilon,
                           Address total_address, Address norm_address, Address mean_address, Address rstd_address,
                           Sizes<3> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const Rows x(x_address, x_strides), residual(residual_address, residual_strides);
    const auto *weight = pointer<const float>(weight_address), *bias = pointer<const float>(bias_address);
    auto *total = pointer<float>(total_address), *norm = pointer<float>(norm_address);
    auto *mean = pointer<float>(mean_address), *rstd = pointer<float>(rstd_address);
    const int64_t inner = sizes[1], rows = sizes[0] * inner, width = sizes[2];
    const std::vector<float> zeros(residual && !residual_bias_address ? width : 0);
    const float* shift = residual_bias_address ? pointer<const float>(residual_bias_address) : zeros.data();
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t a = r / inner, b = r % inner;
        const float* row = x.at(a, b);
        float all;
        if (residual) {
            float* added = total + r * width;
            all = add_and_sum(added, row, residual.at(a, b), shift, width);
            row = added;
        } else {
            all = sum(row, width);
        }
        const float centre = all / static_cast<float>(width);
        const float scale = 1 / std::sqrt(squares(row, centre, width) / static_cast<float>(width) + epsilon);
        normalise(norm + r * width, row, centre, scale, weight, bias, width);
        mean[r] = centre;
        rstd[r] = scale;
    }
}

static void add_layer_norm_backward(Address grad_total_address, Sizes<2> grad_total_strides, Address grad_norm_address,
                                    Sizes<2> grad_norm_strides, Address total_address, Sizes<2> total_strides,
                                    Address weight_address, Address bias_address, Address mean_address,
                                    Address rstd_address, Address grad_x_address, Address grad_weight_address,
                                    Address grad_bias_address, Address row_sum_address, Address norm_address,
                                    Sizes<3> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const Rows grad_total(grad_total_address, grad_total_strides), grad_norm(grad_norm_address, grad_norm_strides);
    const Rows total(total_address, total_strides);
    const auto *weight = pointer<const float>(weight_address), *bias = pointer<const float>(bias_address);
    const auto *mean = pointer<const float>(mean_address), *rstd = pointer<const float>(rstd_address);
    auto *grad_x = pointer<float>(grad_x_address), *norm = pointer<float>(norm_address);
    auto* row_sum = pointer<float>(row_sum_address);
    const int64_t inner = sizes[1], rows = sizes[0] * inner, width = sizes[2];
    const int64_t parts = ColumnSums::parts(rows);
    ColumnSums weights(parts, width), biases(parts, width), all(row_sum ? parts : 0, width);
    const std::vector<float> zeros(grad_total ? 0 : width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t part = 0; part < parts; ++part) {
        weights.begin(part);
        biases.begin(part);
        if (row_sum) all.begin(part);
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
            const int64_t a = r / inner, b = r % inner;
            const float *grad = grad_norm.at(a, b), *row = total.at(a, b);
            const float centre = mean[r], scale = rstd[r];
            float* out = grad_x + r * width;
            const float* added = grad_total ? grad_total.at(a, b) : zeros.data();
            const Sums sums = sums_of(grad, row, centre, scale, weight, width);
            gradients(out, weights.recent(part), biases.recent(part), grad, row, centre, scale, weight, added, sums,
                      width);
            if (row_sum) accumulate(all.recent(part), out, width);
            if (norm) normalise(norm + r * width, row, centre, scale, weight, bias, width);
        }
    }
    weights.store(pointer<float>(grad_weight_address));
    biases.store(pointer<float>(grad_bias_address));
    if (row_sum) all.store(row_sum);
}

void bind_add_layer_norm(nb::module_& module) {
    module.def("add_layer_norm", &add_layer_norm, nb::arg("x"), nb::arg("x_strides"), nb::arg("residual"),
               nb::arg("residual_strides"), nb::arg("residual_bias"), nb::arg("weight"), nb::arg("bias"),
               nb::arg("epsilon"), nb::arg("total"), nb::arg("norm"), nb::arg("mean"), nb::arg("rstd"),
               nb::arg("sizes"), nb::arg("threads"));
    module.def("add_layer_norm_backward", &add_layer_norm_backward, nb::arg("grad_total"), nb::arg("grad_total_strides"),
               nb::arg("grad_norm"), nb::arg("grad_norm_strides"), nb::arg("total"), nb::arg("total_strides"),
               nb::arg("weight"), nb::arg("bias"), nb::arg("mean"), nb::arg("rstd"), nb::arg("grad_x"),
               nb::arg("grad_weight"), nb::arg("grad_bias"), nb::arg("row_sum"), nb::arg("norm"), nb::arg("sizes"),
               nb::arg("threads"));
}

}  // namespace mmmae

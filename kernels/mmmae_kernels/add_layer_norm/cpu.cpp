// Residual add and layer norm over the last axis, and the gradients of both.
#include "cpu/arrays.h"
#include "cpu/rows.h"

#include <nanobind/stl/optional.h>

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

static void add_layer_norm(const Input& x_array, const Maybe<Input>& residual_array,
                           const Maybe<Input>& residual_bias_array, const Input& weight_array, const Input& bias_array,
                           float epsilon, const Maybe<Output>& total_array, const Output& norm_array,
                           const Output& mean_array, const Output& rstd_array, int threads) {
    const auto x = view<const float, 3>("x", x_array, "[A, B, D]");
    const auto residual = view<const float, 3>("residual", residual_array, "[A, B, D]");
    const auto residual_bias = view<const float, 1>("residual_bias", residual_bias_array, "[D]");
    const auto weight = view<const float, 1>("weight", weight_array, "[D]");
    const auto bias = view<const float, 1>("bias", bias_array, "[D]");
    const auto total = view<float, 3>("total", total_array, "[A, B, D]");
    const auto norm = view<float, 3>("norm", norm_array, "[A, B, D]");
    const auto mean = view<float, 1>("mean", mean_array, "[A*B]");
    const auto rstd = view<float, 1>("rstd", rstd_array, "[A*B]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t inner = x.shape[1], rows = x.shape[0] * inner, width = x.shape[2];
    x.require_dense_rows();
    for (const auto& parameter : {weight, bias}) {
        parameter.require_shape({width});
        parameter.require_dense_rows();
    }
    if (residual.has_value() != total.has_value()) fail("total: wanted with a residual, and only then");
    if (residual) {
        residual->require_shape(x.shape);
        residual->require_dense_rows();
        total->require_shape(x.shape);
        total->require_contiguous();
    }
    if (residual_bias) {
        if (!residual) fail("residual_bias: without a residual");
        residual_bias->require_shape({width});
        residual_bias->require_dense_rows();
    }
    norm.require_shape(x.shape);
    norm.require_contiguous();
    for (const auto& statistic : {mean, rstd}) {
        statistic.require_shape({rows});
        statistic.require_contiguous();
    }
    const std::vector<float> zeros(residual_bias ? 0 : width);
    const float* shift = residual_bias ? residual_bias->data : zeros.data();
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t a = r / inner, b = r % inner;
        const float* row = x.row(a, b);
        float all;
        if (residual) {
            float* added = total->data + r * width;
            all = add_and_sum(added, row, residual->row(a, b), shift, width);
            row = added;
        } else {
            all = sum(row, width);
        }
        const float centre = all / static_cast<float>(width);
        const float scale = 1 / std::sqrt(squares(row, centre, width) / static_cast<float>(width) + epsilon);
        normalise(norm.data + r * width, row, centre, scale, weight.data, bias.data, width);
        mean.data[r] = centre;
        rstd.data[r] = scale;
    }
}

static void add_layer_norm_backward(const Maybe<Input>& grad_total_array, const Input& grad_norm_array,
                                    const Input& total_array, const Input& weight_array, const Maybe<Input>& bias_array,
                                    const Input& mean_array, const Input& rstd_array, const Output& grad_x_array,
                                    const Output& grad_weight_array, const Output& grad_bias_array,
                                    const Maybe<Output>& row_sum_array, const Maybe<Output>& norm_array, int threads) {
    const auto grad_total = view<const float, 3>("grad_total", grad_total_array, "[A, B, D]");
    const auto grad_norm = view<const float, 3>("grad_norm", grad_norm_array, "[A, B, D]");
    const auto total = view<const float, 3>("total", total_array, "[A, B, D]");
    const auto weight = view<const float, 1>("weight", weight_array, "[D]");
    const auto bias = view<const float, 1>("bias", bias_array, "[D]");
    const auto mean = view<const float, 1>("mean", mean_array, "[A*B]");
    const auto rstd = view<const float, 1>("rstd", rstd_array, "[A*B]");
    const auto grad_x = view<float, 3>("grad_x", grad_x_array, "[A, B, D]");
    const auto grad_weight = view<float, 1>("grad_weight", grad_weight_array, "[D]");
    const auto grad_bias = view<float, 1>("grad_bias", grad_bias_array, "[D]");
    const auto row_sum = view<float, 1>("row_sum", row_sum_array, "[D]");
    const auto norm = view<float, 3>("norm", norm_array, "[A, B, D]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t inner = total.shape[1], rows = total.shape[0] * inner, width = total.shape[2];
    total.require_dense_rows();
    grad_norm.require_shape(total.shape);
    grad_norm.require_dense_rows();
    weight.require_shape({width});
    weight.require_dense_rows();
    for (const auto& statistic : {mean, rstd}) {
        statistic.require_shape({rows});
        statistic.require_contiguous();
    }
    if (grad_total) {
        grad_total->require_shape(total.shape);
        grad_total->require_dense_rows();
    }
    if (bias.has_value() != norm.has_value()) fail("norm: wanted with a bias, and only then");
    if (bias) {
        bias->require_shape({width});
        bias->require_dense_rows();
        norm->require_shape(total.shape);
        norm->require_contiguous();
    }
    grad_x.require_shape(total.shape);
    grad_x.require_contiguous();
    for (const auto& sums : {grad_weight, grad_bias}) {
        sums.require_shape({width});
        sums.require_contiguous();
    }
    if (row_sum) {
        row_sum->require_shape({width});
        row_sum->require_contiguous();
    }
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
            const float *grad = grad_norm.row(a, b), *row = total.row(a, b);
            const float centre = mean.data[r], scale = rstd.data[r];
            float* out = grad_x.data + r * width;
            const float* added = grad_total ? grad_total->row(a, b) : zeros.data();
            const Sums sums = sums_of(grad, row, centre, scale, weight.data, width);
            gradients(out, weights.recent(part), biases.recent(part), grad, row, centre, scale, weight.data, added, sums,
                      width);
            if (row_sum) accumulate(all.recent(part), out, width);
            if (bias) normalise(norm->data + r * width, row, centre, scale, weight.data, bias->data, width);
        }
    }
    weights.store(grad_weight.data);
    biases.store(grad_bias.data);
    if (row_sum) all.store(row_sum->data);
}

void bind_add_layer_norm(nb::module_& module) {
    module.def("add_layer_norm", &add_layer_norm, nb::arg("x"), nb::arg("residual").none(),
               nb::arg("residual_bias").none(), nb::arg("weight"), nb::arg("bias"), nb::arg("epsilon"), nb::arg("total").none(), nb::arg("norm"), nb::arg("mean"),
               nb::arg("rstd"), nb::arg("threads"));
    module.def("add_layer_norm_backward", &add_layer_norm_backward, nb::arg("grad_total").none(), nb::arg("grad_norm"),
               nb::arg("total"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("mean"), nb::arg("rstd"),
               nb::arg("grad_x"), nb::arg("grad_weight"), nb::arg("grad_bias"), nb::arg("row_sum").none(), nb::arg("norm").none(),
               nb::arg("threads"));
}

}  // namespace mmmae

// Squared error of predicted tokens against given ones, and its gradient, row by row.
#include "cpu/arrays.h"
#include "cpu/rows.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

namespace mmmae {
namespace {

// A target row becomes (target - mean) * scale.
struct Moments {
    float mean = 0, scale = 1;
};

Moments moments(const float* row, int64_t width, float epsilon) {
    const float mean = sum(row, width) / static_cast<float>(width);
    const float variance = squares(row, mean, width) / static_cast<float>(std::max<int64_t>(width - 1, 1));
    return {mean, 1 / std::sqrt(variance + epsilon)};
}

MMMAE_VECTOR float squared_error(const float* __restrict prediction, const float* __restrict target, Moments moments,
                                 int64_t width) {
    return sum_of(width, [=](int64_t i) {
        const float difference = prediction[i] - (target[i] - moments.mean) * moments.scale;
        return difference * difference;
    });
}

// The same, and out = factor * difference.
MMMAE_VECTOR float squared_error(const float* __restrict prediction, const float* __restrict target, Moments moments,
                                 float factor, float* __restrict out, int64_t width) {
    return sum_of(width, [=](int64_t i) {
        const float difference = prediction[i] - (target[i] - moments.mean) * moments.scale;
        out[i] = factor * difference;
        return difference * difference;
    });
}

// The same of a row that holds the difference already but for the bias.
MMMAE_VECTOR float squared_error(float* __restrict row, const float* __restrict bias, float factor, int64_t width) {
    return sum_of(width, [=](int64_t i) {
        const float difference = row[i] - bias[i];
        row[i] = factor * difference;
        return difference * difference;
    });
}

using Weights = std::optional<View<const float, 2>>;

float weight(const Weights& weights, int64_t b, int64_t m) { return weights ? *weights->row(b, m) : 1.0f; }

double sum_in_order(const std::vector<double>& numbers) {
    double total = 0;
    for (double number : numbers) total += number;
    return total;
}

}  // namespace

static double masked_l2_loss(const Input& prediction_array, const Input& target_array, const Maybe<Input>& ids_array,
                             const Maybe<Input>& weights_array, std::optional<float> epsilon, double factor,
                             const Maybe<Output>& out_array, int threads) {
    const auto prediction = view<const float, 3>("prediction", prediction_array, "[B, M, D]");
    const auto target = view<const float, 3>("target", target_array, "[B, N, D]");
    const auto ids = view<const int64_t, 2>("ids", ids_array, "[B, M]");
    const auto weights = view<const float, 2>("weights", weights_array, "[B, M]");
    const auto out = view<float, 3>("out", out_array, "[B, M, D]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const auto [batch, masked, width] = prediction.shape;
    target.require_shape({batch, ids ? target.shape[1] : masked, width});
    prediction.require_dense_rows();
    target.require_dense_rows();
    if (ids) {
        ids->require_shape({batch, masked});
        check_ids(*ids, target.shape[1]);
    }
    if (weights) weights->require_shape({batch, masked});
    if (out) {
        out->require_shape(prediction.shape);
        out->require_contiguous();
    }
    const int64_t rows = batch * masked, per_sample = masked, channels = width;
    std::vector<double> errors(rows);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * channels >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / per_sample, m = row % per_sample;
        const float *ours = prediction.row(b, m), *theirs = target.row(b, ids ? *ids->row(b, m) : m);
        const Moments to = epsilon ? moments(theirs, channels, *epsilon) : Moments();
        const float share = weight(weights, b, m);
        errors[row] = share * (out ? squared_error(ours, theirs, to, static_cast<float>(factor * share),
                                                   out->data + row * channels, channels)
                                   : squared_error(ours, theirs, to, channels));
    }
    return sum_in_order(errors);
}

static double l2_loss_of_difference(const Output& difference_array, const Maybe<Input>& bias_array,
                                    const Maybe<Input>& weights_array, double factor, int threads) {
    const auto difference = view<float, 3>("difference", difference_array, "[B, M, D]");
    const auto bias = view<const float, 1>("bias", bias_array, "[D]");
    const auto weights = view<const float, 2>("weights", weights_array, "[B, M]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t batch = difference.shape[0], masked = difference.shape[1], width = difference.shape[2];
    difference.require_contiguous();
    if (bias) {
        bias->require_shape({width});
        bias->require_dense_rows();
    }
    if (weights) weights->require_shape({batch, masked});
    const std::vector<float> zeros(bias ? 0 : width);
    const float* subtracted = bias ? bias->data : zeros.data();
    const int64_t rows = batch * masked;
    std::vector<double> errors(rows);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row) {
        const float share = weight(weights, row / masked, row % masked);
        errors[row] = share * squared_error(difference.data + row * width, subtracted,
                                            static_cast<float>(factor * share), width);
    }
    return sum_in_order(errors);
}

void bind_masked_loss(nb::module_& module) {
    module.def("masked_l2_loss", &masked_l2_loss, nb::arg("prediction"), nb::arg("target"), nb::arg("ids").none(),
               nb::arg("weights").none(), nb::arg("epsilon").none(), nb::arg("factor"), nb::arg("out").none(),
               nb::arg("threads"));
    module.def("l2_loss_of_difference", &l2_loss_of_difference, nb::arg("difference"), nb::arg("bias").none(),
               nb::arg("weights").none(), nb::arg("factor"), nb::arg("threads"));
}

}  // namespace mmmae

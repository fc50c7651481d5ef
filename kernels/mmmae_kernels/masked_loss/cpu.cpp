// Squared error of predicted tokens, and its gradient, row by row.
#include "cpu/floats.h"
#include "cpu/rows.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace mmmae {
namespace {

// Normalisation of a target row: (target - mean) * scale.
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

// Returns the same and writes out = factor * difference.
MMMAE_VECTOR float squared_error(const float* __restrict prediction, const float* __restrict target, Moments moments,
                                 float factor, float* __restrict out, int64_t width) {
    return sum_of(width, [=](int64_t i) {
        const float difference = prediction[i] - (target[i] - moments.mean) * moments.scale;
        out[i] = factor * difference;
        return difference * difference;
    });
}

// Returns the same for a row that holds the difference plus the bias, and overwrites it with factor * difference.
MMMAE_VECTOR float squared_error(float* __restrict row, const float* __restrict bias, float factor, int64_t width) {
    return sum_of(width, [=](int64_t i) {
        const float difference = row[i] - bias[i];
        row[i] = factor * difference;
        return difference * difference;
    });
}

using Weights = View<const float, 2>;  // [B, M]; none means 1

float weight(const Weights& weights, int64_t b, int64_t m) { return weights ? *weights.at(b, m) : 1.0f; }

double sum_in_order(const std::vector<double>& numbers) {
    double total = 0;
    for (double number : numbers) total += number;
    return total;
}

}  // namespace

static double masked_l2_loss(Address prediction_address, Sizes<2> prediction_strides, Address target_address,
                             Sizes<2> target_strides, Address ids_address, Sizes<2> ids_strides,
                             Address weights_address, Sizes<2> weights_strides, std::optional<float> epsilon,
                             double factor, Address out_address, Dtypes<3> dtypes, Sizes<4> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t batch = sizes[0], masked = sizes[1], tokens = sizes[2], width = sizes[3];
    const Input prediction(prediction_address, prediction_strides, dtypes[0], width);
    const Input target(target_address, target_strides, dtypes[1], width);
    const Ids ids(ids_address, ids_strides);
    const Weights weights(weights_address, weights_strides);
    if (ids) check_ids("ids", ids, batch, masked, tokens);
    const Output out(out_address, dtypes[2], width);
    const Buffers buffers(any_half(dtypes), threads, 3, width);
    const int64_t rows = batch * masked;
    std::vector<double> errors(rows);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / masked, m = row % masked;
        const float* predicted = prediction.row(b, m, buffers[0]);
        const float* wanted = target.row(b, ids ? *ids.at(b, m) : m, buffers[1]);
        const Moments normalisation = epsilon ? moments(wanted, width, *epsilon) : Moments();
        const float w = weight(weights, b, m);
        if (!out) {
            errors[row] = w * squared_error(predicted, wanted, normalisation, width);
            continue;
        }
        float* gradient = out.row(row, buffers[2]);
        const auto scale = static_cast<float>(factor * w);
        errors[row] = w * squared_error(predicted, wanted, normalisation, scale, gradient, width);
        out.store(row, gradient);
    }
    return sum_in_order(errors);
}

static double l2_loss_of_difference(Address difference_address, Address bias_address, Address weights_address,
                                    Sizes<2> weights_strides, double factor, Sizes<3> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t masked = sizes[1], rows = sizes[0] * masked, width = sizes[2];
    auto* difference = pointer<float>(difference_address);
    const Weights weights(weights_address, weights_strides);
    const std::vector<float> zeros(bias_address ? 0 : width);
    const float* subtracted = bias_address ? pointer<const float>(bias_address) : zeros.data();
    std::vector<double> errors(rows);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row) {
        const float w = weight(weights, row / masked, row % masked);
        errors[row] = w * squared_error(difference + row * width, subtracted, static_cast<float>(factor * w), width);
    }
    return sum_in_order(errors);
}

void bind_masked_loss(nb::module_& module) {
    module.def("masked_l2_loss", &masked_l2_loss, nb::arg("prediction"), nb::arg("prediction_strides"),
               nb::arg("target"), nb::arg("target_strides"), nb::arg("ids"), nb::arg("ids_strides"),
               nb::arg("weights"), nb::arg("weights_strides"), nb::arg("epsilon").none(), nb::arg("factor"),
               nb::arg("out"), nb::arg("dtypes"), nb::arg("sizes"), nb::arg("threads"));
    module.def("l2_loss_of_difference", &l2_loss_of_difference, nb::arg("difference"), nb::arg("bias"),
               nb::arg("weights"), nb::arg("weights_strides"), nb::arg("factor"), nb::arg("sizes"), nb::arg("threads"));
}

}  // namespace mmmae

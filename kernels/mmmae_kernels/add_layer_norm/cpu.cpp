// Residual add and layer norm over the last axis, and the gradients of both.
#include "cpu/floats.h"
#include "cpu/rows.h"

#include <nanobind/stl/array.h>

#include <cmath>
#include <vector>

namespace mmmae {
namespace {

// Writes out = a + (b + c) and returns the sum of out.
MMMAE_VECTOR float add_and_sum(float* __restrict out, const float* __restrict a, const float* __restrict b,
                               const float* __restrict c, int64_t width) {
    return sum_of(width, [=](int64_t i) { return out[i] = a[i] + (b[i] + c[i]); });
}

MMMAE_VECTOR void normalise(float* __restrict out, const float* __restrict row, float mean, float rstd,
                            const float* __restrict weight, const float* __restrict bias, int64_t width) {
    for (int64_t i = 0; i < width; ++i) out[i] = (row[i] - mean) * rstd * weight[i] + bias[i];
}

struct Sums {
    float scaled, times_normalised;  // sums of grad * weight, and of grad * weight * normalised row
};

// Computes both in one pass, in four quarters side by side as in sum_of.
MMMAE_VECTOR Sums sums_of(const float* __restrict grad, const float* __restrict row, float mean, float rstd,
                          const float* __restrict weight, int64_t width) {
    const int64_t quarter = width / 4;
    float scaled0 = 0, scaled1 = 0, scaled2 = 0, scaled3 = 0, times0 = 0, times1 = 0, times2 = 0, times3 = 0;
#pragma omp simd reduction(+ : scaled0, scaled1, scaled2, scaled3, times0, times1, times2, times3)
    for (int64_t i = 0; i < quarter; ++i) {
        const int64_t j = i + quarter, k = i + 2 * quarter, l = i + 3 * quarter;
        const float a = grad[i] * weight[i], b = grad[j] * weight[j], c = grad[k] * weight[k], d = grad[l] * weight[l];
        scaled0 += a;
        scaled1 += b;
        scaled2 += c;
        scaled3 += d;
        times0 += a * (row[i] - mean);
        times1 += b * (row[j] - mean);
        times2 += c * (row[k] - mean);
        times3 += d * (row[l] - mean);
    }
    Sums sums{(scaled0 + scaled1) + (scaled2 + scaled3), (times0 + times1) + (times2 + times3)};
    for (int64_t i = 4 * quarter; i < width; ++i) {
        sums.scaled += grad[i] * weight[i];
        sums.times_normalised += grad[i] * weight[i] * (row[i] - mean);
    }
    return {sums.scaled, sums.times_normalised * rstd};
}

// A row in the backward pass.
struct Pass {
    const float *grad, *row, *added;
    float* out;
    float mean, rstd;
    float first, second;  // means of the two terms of Sums
};

// Processes COUNT rows at a time, so that the column sums are read and written once for all of them.
template <int COUNT>
[[gnu::always_inline]] inline void gradients(const Pass* passes, const float* weight, float* grad_weight,
                                             float* grad_bias, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        float weight_sum = 0, bias_sum = 0;
#pragma GCC unroll 8
        for (int k = 0; k < COUNT; ++k) {
            const Pass& pass = passes[k];
            const float grad = pass.grad[i], normalised = (pass.row[i] - pass.mean) * pass.rstd;
            pass.out[i] = pass.rstd * (grad * weight[i] - pass.first - normalised * pass.second) + pass.added[i];
            weight_sum += grad * normalised;
            bias_sum += grad;
        }
        grad_weight[i] += weight_sum;
        grad_bias[i] += bias_sum;
    }
}

constexpr int64_t TOGETHER = 4;

MMMAE_VECTOR void gradients_of_one(const Pass* passes, const float* weight, float* grad_weight, float* grad_bias,
                                   int64_t width) {
    const Pass pass = passes[0];
    gradients<1>(&pass, weight, grad_weight, grad_bias, width);
}

MMMAE_VECTOR void gradients_together(const Pass* passes, const float* weight, float* grad_weight, float* grad_bias,
                                     int64_t width) {
    const Pass copies[TOGETHER] = {passes[0], passes[1], passes[2], passes[3]};
    gradients<TOGETHER>(copies, weight, grad_weight, grad_bias, width);
}

}  // namespace

static void add_layer_norm(Address x_address, Sizes<2> x_strides, Address residual_address, Sizes<2> residual_strides,
                           Address residual_bias_address, Address weight_address, Address bias_address, float epsilon,
                           Address total_address, Address norm_address, Address mean_address, Address rstd_address,
                           Dtypes<4> dtypes, Sizes<3> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t inner = sizes[1], rows = sizes[0] * inner, width = sizes[2];
    const Input x(x_address, x_strides, dtypes[0], width);
    const Input residual(residual_address, residual_strides, dtypes[1], width);
    const auto *weight = pointer<const float>(weight_address), *bias = pointer<const float>(bias_address);
    const Output total(total_address, dtypes[2], width), norm(norm_address, dtypes[3], width);
    auto *mean = pointer<float>(mean_address), *rstd = pointer<float>(rstd_address);
    const std::vector<float> zeros(residual && !residual_bias_address ? width : 0);
    const float* shift = residual_bias_address ? pointer<const float>(residual_bias_address) : zeros.data();
    const Buffers buffers(any_half(dtypes), threads, 3, width);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t a = r / inner, b = r % inner;
        const float* row = x.row(a, b, buffers[0]);
        float all;
        if (residual) {
            float* added = total.row(r, buffers[2]);
            all = add_and_sum(added, row, residual.row(a, b, buffers[1]), shift, width);
            row = added;
            if (!total.in_place()) {  // the statistics are those of the sum as it is stored
                total.store(r, added);
                all = sum(total.load(r, added), width);
            }
        } else {
            all = sum(row, width);
        }
        const float centre = all / static_cast<float>(width);
        const float scale = 1 / std::sqrt(squares(row, centre, width) / static_cast<float>(width) + epsilon);
        float* normalised = norm.row(r, buffers[1]);
        normalise(normalised, row, centre, scale, weight, bias, width);
        norm.store(r, normalised);
        mean[r] = centre;
        rstd[r] = scale;
    }
}

static void add_layer_norm_backward(Address grad_total_address, Sizes<2> grad_total_strides, Address grad_norm_address,
                                    Sizes<2> grad_norm_strides, Address total_address, Sizes<2> total_strides,
                                    Address weight_address, Address bias_address, Address mean_address,
                                    Address rstd_address, Address grad_x_address, Address grad_residual_address,
                                    Address grad_weight_address, Address grad_bias_address, Address row_sum_address,
                                    Address norm_address, Dtypes<4> dtypes, Sizes<3> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t inner = sizes[1], rows = sizes[0] * inner, width = sizes[2];
    const Input grad_total(grad_total_address, grad_total_strides, dtypes[0], width);
    const Input grad_norm(grad_norm_address, grad_norm_strides, dtypes[1], width);
    const Input total(total_address, total_strides, dtypes[2], width);
    const auto *weight = pointer<const float>(weight_address), *bias = pointer<const float>(bias_address);
    const auto *mean = pointer<const float>(mean_address), *rstd = pointer<const float>(rstd_address);
    const Output grad_x(grad_x_address, dtypes[2], width), grad_residual(grad_residual_address, dtypes[3], width);
    const Output norm(norm_address, dtypes[1], width);
    auto* row_sum = pointer<float>(row_sum_address);
    const int64_t parts = ColumnSums::parts(rows);
    ColumnSums weights(parts, width), biases(parts, width), all(row_sum ? parts : 0, width);
    const std::vector<float> zeros(grad_total ? 0 : width);
    const Buffers buffers(any_half(dtypes), threads, 4 * TOGETHER, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t part = 0; part < parts; ++part) {
        weights.begin(part);
        biases.begin(part);
        if (row_sum) all.begin(part);
        const auto begin = [&](int64_t r, int64_t first_buffer) {
            const int64_t a = r / inner, b = r % inner;
            const float* grad = grad_norm.row(a, b, buffers[first_buffer]);
            const float* row = total.row(a, b, buffers[first_buffer + 1]);
            const Sums sums = sums_of(grad, row, mean[r], rstd[r], weight, width);
            return Pass{grad,
                        row,
                        grad_total ? grad_total.row(a, b, buffers[first_buffer + 2]) : zeros.data(),
                        grad_x.row(r, buffers[first_buffer + 3]),
                        mean[r],
                        rstd[r],
                        sums.scaled / static_cast<float>(width),
                        sums.times_normalised / static_cast<float>(width)};
        };
        const auto end = [&](int64_t r, const Pass& pass) {
            if (row_sum) accumulate(all.recent(part), pass.out, width);
            grad_x.store(r, pass.out);
            if (grad_residual) grad_residual.store(r, pass.out);
            if (norm) {
                float* normalised = norm.row(r, buffers[0]);
                normalise(normalised, pass.row, pass.mean, pass.rstd, weight, bias, width);
                norm.store(r, normalised);
            }
        };
        const int64_t last = rows * (part + 1) / parts;
        for (int64_t r = rows * part / parts, count; r < last; r += count) {
            count = last - r < TOGETHER ? 1 : TOGETHER;
            Pass passes[TOGETHER];
            for (int64_t k = 0; k < count; ++k) passes[k] = begin(r + k, 4 * k);
            (count == 1 ? gradients_of_one : gradients_together)(passes, weight, weights.recent(part),
                                                                 biases.recent(part), width);
            for (int64_t k = 0; k < count; ++k) end(r + k, passes[k]);
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
               nb::arg("dtypes"), nb::arg("sizes"), nb::arg("threads"));
    module.def("add_layer_norm_backward", &add_layer_norm_backward, nb::arg("grad_total"),
               nb::arg("grad_total_strides"), nb::arg("grad_norm"), nb::arg("grad_norm_strides"), nb::arg("total"),
               nb::arg("total_strides"), nb::arg("weight"), nb::arg("bias"), nb::arg("mean"), nb::arg("rstd"),
               nb::arg("grad_x"), nb::arg("grad_residual"), nb::arg("grad_weight"), nb::arg("grad_bias"),
               nb::arg("row_sum"), nb::arg("norm"), nb::arg("dtypes"), nb::arg("sizes"), nb::arg("threads"));
}

}  // namespace mmmae

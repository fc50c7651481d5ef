// GELU on the CPU, exact, and its derivative with the activation computed again, for a backward pass that did not keep it.
#include "cpu/arrays.h"
#include "cpu/rows.h"

#include <nanobind/stl/optional.h>

#include <cmath>
#include <cstring>
#include <vector>

namespace mmmae {
namespace {

// An exponential costs about as much as this many copied numbers.
constexpr int64_t GELU_COST = 8;

// exp(y) for y <= 0, off by at most 2 units in the last place, and 0 below -87.7, where float has no normal numbers left:
// 2^n times a polynomial of the rest, y - n log 2 with log 2 in two parts. Its coefficients are a relative minimax fit over [-log(2)/2, log(2)/2], off by 2e-9.
inline float exponential(float y) {
    constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits
    y = y < -88.0f ? -88.0f : y;  // here n is -127, whose bits as a power of two are those of 0; and no branch
    const float shifted = y * 1.44269504f + TO_INTEGER, n = shifted - TO_INTEGER;
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 0.00138357619f;
    p = p * r + 0.00837564468f;
    p = p * r + 0.0416682884f;
    p = p * r + 0.166664109f;
    p = p * r + 0.499999911f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const uint32_t scale_bits = (bits + 127) << 23;
    float scale;
    std::memcpy(&scale, &scale_bits, sizeof scale);
    return p * scale;
}

struct Normal {
    float below, exponential;  // the share of the normal distribution below x, and exp(-x^2/2)
};

// The share Phi(-a) of the normal distribution below -a is exp(-a^2/2) t P(t) with t = 1 / (1 + 0.35 a). P is a relative
// minimax fit over a in 0..14, off by 3.2e-8 (Lawson's reweighted least squares on Chebyshev polynomials, of values to 40
// digits).
inline Normal normal(float x) {
    const float e = exponential(-0.5f * x * x), t = 1.0f / (1.0f + 0.35f * std::fabs(x));
    float p = -0.0291460771f;
    p = p * t + 0.143972412f;
    p = p * t - 0.255715698f;
    p = p * t + 0.159175798f;
    p = p * t - 0.0231109541f;
    p = p * t + 0.105508469f;
    p = p * t + 0.119832754f;
    p = p * t + 0.139861882f;
    p = p * t + 0.139621407f;
    const float beyond = e * t * p;
    return {x < 0 ? beyond : 1.0f - beyond, e};
}

MMMAE_VECTOR void activate(float* __restrict activated, const float* __restrict hidden, const float* __restrict bias,
                           int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        const float x = hidden[i] + bias[i];
        activated[i] = x * normal(x).below;
    }
}

// The gradient by the activation becomes that by what was activated.
MMMAE_VECTOR void derive(float* __restrict grad, float* __restrict activated, float* __restrict sum,
                         const float* __restrict hidden, const float* __restrict bias, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        const float x = hidden[i] + bias[i];
        const Normal at = normal(x);
        activated[i] = x * at.below;
        grad[i] *= at.below + x * (0.398942280f * at.exponential);
        sum[i] += grad[i];
    }
}

}  // namespace

static void gelu(const Input& hidden_array, const Maybe<Input>& bias_array, const Output& activated_array, int threads) {
    const auto hidden = view<const float, 3>("hidden", hidden_array, "[A, B, H]");
    const auto bias = view<const float, 1>("bias", bias_array, "[H]");
    const auto activated = view<float, 3>("activated", activated_array, "[A, B, H]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t inner = hidden.shape[1], rows = hidden.shape[0] * inner, width = hidden.shape[2];
    hidden.require_dense_rows();
    if (bias) {
        bias->require_shape({width});
        bias->require_dense_rows();
    }
    activated.require_shape(hidden.shape);
    activated.require_contiguous();
    const std::vector<float> zeros(bias ? 0 : width);
    const float* added = bias ? bias->data : zeros.data();
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width * GELU_COST >= PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; ++r)
        activate(activated.data + r * width, hidden.row(r / inner, r % inner), added, width);
}

static void gelu_backward(const Output& grad_array, const Input& hidden_array, const Maybe<Input>& bias_array,
                          const Output& activated_array, const Maybe<Output>& grad_bias_array, int threads) {
    const auto grad = view<float, 3>("grad", grad_array, "[A, B, H]");
    const auto hidden = view<const float, 3>("hidden", hidden_array, "[A, B, H]");
    const auto bias = view<const float, 1>("bias", bias_array, "[H]");
    const auto activated = view<float, 3>("activated", activated_array, "[A, B, H]");
    const auto grad_bias = view<float, 1>("grad_bias", grad_bias_array, "[H]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t inner = hidden.shape[1], rows = hidden.shape[0] * inner, width = hidden.shape[2];
    hidden.require_dense_rows();
    for (const auto& output : {grad, activated}) {
        output.require_shape(hidden.shape);
        output.require_contiguous();
    }
    if (bias.has_value() != grad_bias.has_value()) fail("grad_bias: wanted with a bias, and only then");
    if (bias) {
        bias->require_shape({width});
        bias->require_dense_rows();
        grad_bias->require_shape({width});
        grad_bias->require_contiguous();
    }
    const std::vector<float> zeros(bias ? 0 : width);
    const float* added = bias ? bias->data : zeros.data();
    const int64_t parts = ColumnSums::parts(rows);
    ColumnSums sums(parts, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * width * GELU_COST >= PARALLEL_ELEMENTS)
    for (int64_t part = 0; part < parts; ++part) {
        sums.begin(part);
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
            derive(grad.data + r * width, activated.data + r * width, sums.recent(part), hidden.row(r / inner, r % inner),
                   added, width);
    }
    if (grad_bias) sums.store(grad_bias->data);
}

void bind_gelu_linear(nb::module_& module) {
    module.def("gelu", &gelu, nb::arg("hidden"), nb::arg("bias").none(), nb::arg("activated"), nb::arg("threads"));
    module.def("gelu_backward", &gelu_backward, nb::arg("grad"), nb::arg("hidden"), nb::arg("bias").none(),
               nb::arg("activated"), nb::arg("grad_bias").none(), nb::arg("threads"));
}

}  // namespace mmmae

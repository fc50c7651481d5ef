// The exact GELU and its derivative in one pass, for a backward pass that computes the activated hidden state again.
#include "native.h"

#include <algorithm>
#include <cstring>

namespace mmmae {
namespace {

// An exponential costs about as much as this many copied numbers.
constexpr int64_t GELU_COST = 8;
constexpr int64_t BLOCK = 1024;

// exp(y) for y in [-87, 0], off by at most 2 units in the last place: 2^n times a polynomial of the rest, y - n log 2 with
// log 2 in two parts. Its coefficients are a relative minimax fit over [-log(2)/2, log(2)/2], off by 2e-9.
inline float exponential(float y) {
    constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits
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

// The share Phi(-a) of the normal distribution below -a is exp(-a^2/2) t P(t) with t = 1 / (1 + 0.35 a). P is a relative
// minimax fit over a in 0..14, off by 3.2e-8 (Lawson's reweighted least squares on Chebyshev polynomials, of values to 40
// digits). Below -13.2 the share is 0, where float has no normal numbers left.
MMMAE_VECTOR void gelu_and_derivative(const float* __restrict grad, const float* __restrict hidden,
                                      float* __restrict grad_hidden, float* __restrict activated, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float x = hidden[i], a = x < 0 ? -x : x, y = -0.5f * x * x;
        const float e = y < -87.0f ? 0.0f : exponential(y < -87.0f ? -87.0f : y);
        const float t = 1.0f / (1.0f + 0.35f * a);
        float p = -0.0291460771f;
        p = p * t + 0.143972412f;
        p = p * t - 0.255715698f;
        p = p * t + 0.159175798f;
        p = p * t - 0.0231109541f;
        p = p * t + 0.105508469f;
        p = p * t + 0.119832754f;
        p = p * t + 0.139861882f;
        p = p * t + 0.139621407f;
        const float beyond = e * t * p, below = x < 0 ? beyond : 1.0f - beyond;
        activated[i] = x * below;
        grad_hidden[i] = grad[i] * (below + x * (0.398942280f * e));
    }
}

}  // namespace

static void gelu_backward(const Input& grad_array, const Input& hidden_array, const Output& grad_hidden_array,
                          const Output& activated_array, int threads) {
    const auto grad = view<const float, 3>("grad", grad_array, "[A, B, H]");
    const auto hidden = view<const float, 3>("hidden", hidden_array, "[A, B, H]");
    const auto grad_hidden = view<float, 3>("grad_hidden", grad_hidden_array, "[A, B, H]");
    const auto activated = view<float, 3>("activated", activated_array, "[A, B, H]");
    nb::gil_scoped_release release;
    check_threads(threads);
    grad.require_shape(hidden.shape);
    for (const auto& input : {grad, hidden}) input.require_dense_rows();
    for (const auto& output : {grad_hidden, activated}) {
        output.require_shape(hidden.shape);
        output.require_contiguous();
    }
    const int64_t inner = hidden.shape[1], rows = hidden.shape[0] * inner, width = hidden.shape[2];
    const int64_t blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width * GELU_COST >= PARALLEL_ELEMENTS)
    for (int64_t task = 0; task < rows * blocks; ++task) {
        const int64_t r = task / blocks, first = task % blocks * BLOCK, to = r * width + first;
        gelu_and_derivative(grad.row(r / inner, r % inner) + first, hidden.row(r / inner, r % inner) + first,
                      grad_hidden.data + to, activated.data + to, std::min(BLOCK, width - first));
    }
}

void bind_gelu_linear(nb::module_& module) {
    module.def("gelu_backward", &gelu_backward, nb::arg("grad"), nb::arg("hidden"), nb::arg("grad_hidden"),
               nb::arg("activated"), nb::arg("threads"));
}

}  // namespace mmmae

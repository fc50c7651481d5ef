// Exact GELU on the CPU, and its gradient with the activation computed again in the same pass.
#include "cpu/floats.h"
#include "cpu/halves.h"
#include "cpu/rows.h"

#include <nanobind/stl/array.h>

#include <cmath>
#include <cstring>
#include <vector>

namespace mmmae {
namespace {

// A GELU costs about as much as copying this many numbers.
constexpr int64_t GELU_COST = 8;

// Returns exp(y) for y <= 0 with an error of at most 2 units in the last place, and 0 for y < -87.7, where the result
// would be subnormal. It is 2^n times a polynomial in y - n log 2, with log 2 in two parts. The coefficients are a
// relative minimax fit over [-log(2)/2, log(2)/2] with an error of 2e-9.
inline float exponential(float y) {
    constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits
    y = y < -88.0f ? -88.0f : y;  // gives n = -127, whose power of two has the bits of 0; no branch needed
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
    float cumulative, exponential;  // standard normal distribution function at x, and exp(-x^2/2)
};

// The distribution function Phi(-a) is computed as exp(-a^2/2) t P(t) with t = 1 / (1 + 0.35 a). P is a relative
// minimax fit over a in 0..14 with an error of 3.2e-8 (Lawson's reweighted least squares on Chebyshev polynomials, to
// values with 40 digits).
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
    const float tail = e * t * p;
    return {x < 0 ? tail : 1.0f - tail, e};
}

// E is the type of the numbers in memory, which are computed in float.
template <typename E>
[[gnu::always_inline]] inline void activate(E* __restrict activated, const E* __restrict hidden,
                                            const float* __restrict bias, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        const float x = to_float(hidden[i]) + bias[i];
        assign(activated[i], x * normal(x).cumulative);
    }
}

// Overwrites the gradient of the activation with the gradient of its input.
template <typename E>
[[gnu::always_inline]] inline void differentiate(E* __restrict grad, E* __restrict activated, float* __restrict sum,
                                                 const E* __restrict hidden, const float* __restrict bias,
                                                 int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        const float x = to_float(hidden[i]) + bias[i];
        const Normal at = normal(x);
        assign(activated[i], x * at.cumulative);
        const float changed = to_float(grad[i]) * (at.cumulative + x * (0.398942280f * at.exponential));
        assign(grad[i], changed);
        sum[i] += changed;
    }
}

// A template can't be compiled for several instruction sets, so these are functions.
#define MMMAE_GELU(E)                                                                                                  \
    MMMAE_VECTOR void activate_row(E* __restrict activated, const E* __restrict hidden, const float* __restrict bias,  \
                                   int64_t width) {                                                                    \
        activate(activated, hidden, bias, width);                                                                      \
    }                                                                                                                  \
    MMMAE_VECTOR void differentiate_row(E* __restrict grad, E* __restrict activated, float* __restrict sum,            \
                                        const E* __restrict hidden, const float* __restrict bias, int64_t width) {     \
        differentiate(grad, activated, sum, hidden, bias, width);                                                      \
    }
MMMAE_GELU(float)
MMMAE_GELU(Bfloat16)
MMMAE_GELU(Float16)
#undef MMMAE_GELU

// Calls body with a number of the type of a dtype.
template <typename Body> void with_type(int dtype, Body body) {
    switch (dtype) {
        case FLOAT32: return body(float());
        case BFLOAT16: return body(Bfloat16());
        default: return body(Float16());
    }
}

}  // namespace

static void gelu(Address hidden_address, Sizes<2> hidden_strides, Address bias_address, Address activated_address,
                 int dtype, Sizes<3> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t inner = sizes[1], rows = sizes[0] * inner, width = sizes[2];
    const std::vector<float> zeros(bias_address ? 0 : width);
    const float* added = bias_address ? pointer<const float>(bias_address) : zeros.data();
    with_type(dtype, [&](auto number) {
        using E = decltype(number);
        const View<const E, 2> hidden(hidden_address, hidden_strides);
        const View<E, 1> activated(activated_address, {width});
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width * GELU_COST >= PARALLEL_ELEMENTS)
        for (int64_t r = 0; r < rows; ++r)
            activate_row(activated.at(r), hidden.at(r / inner, r % inner), added, width);
    });
}

static void gelu_backward(Address grad_address, Address hidden_address, Sizes<2> hidden_strides, Address bias_address,
                          Address activated_address, Address grad_bias_address, int dtype, Sizes<3> sizes,
                          int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t inner = sizes[1], rows = sizes[0] * inner, width = sizes[2];
    const std::vector<float> zeros(bias_address ? 0 : width);
    const float* added = bias_address ? pointer<const float>(bias_address) : zeros.data();
    const int64_t parts = ColumnSums::parts(rows);
    ColumnSums sums(parts, width);
    with_type(dtype, [&](auto number) {
        using E = decltype(number);
        const View<const E, 2> hidden(hidden_address, hidden_strides);
        const View<E, 1> grad(grad_address, {width}), activated(activated_address, {width});
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * width * GELU_COST >= PARALLEL_ELEMENTS)
        for (int64_t part = 0; part < parts; ++part) {
            sums.begin(part);
            for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
                differentiate_row(grad.at(r), activated.at(r), sums.recent(part), hidden.at(r / inner, r % inner),
                                  added, width);
        }
    });
    if (grad_bias_address) sums.store(pointer<float>(grad_bias_address));
}

void bind_gelu_linear(nb::module_& module) {
    module.def("gelu", &gelu, nb::arg("hidden"), nb::arg("hidden_strides"), nb::arg("bias"), nb::arg("activated"),
               nb::arg("dtype"), nb::arg("sizes"), nb::arg("threads"));
    module.def("gelu_backward", &gelu_backward, nb::arg("grad"), nb::arg("hidden"), nb::arg("hidden_strides"),
               nb::arg("bias"), nb::arg("activated"), nb::arg("grad_bias"), nb::arg("dtype"), nb::arg("sizes"),
               nb::arg("threads"));
}

}  // namespace mmmae

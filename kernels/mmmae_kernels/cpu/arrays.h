// What the ops' native code shares: views of tensors, and the checks that come before any write.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

// Compiles a function for AVX-512, AVX2 and the plain instruction set, of which the loader takes the best that the CPU has.
// For leaves: functions on plain pointers whose loops the compiler vectorises.
#ifdef MMMAE_CLONES
#define MMMAE_VECTOR __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MMMAE_VECTOR
#endif

namespace mmmae {

namespace nb = nanobind;

using Input = nb::ndarray<nb::ro>;
using Output = nb::ndarray<>;
template <typename Array> using Maybe = std::optional<Array>;

// Below this number of copied elements a second thread costs more than it saves.
constexpr int64_t PARALLEL_ELEMENTS = 32768;

// Raises Python's ValueError.
[[noreturn]] void fail(const std::string& message);

std::string to_string(const int64_t* sizes, size_t count);

// Lies in CPU memory, has this dtype and this number of dimensions; `expected` names them, "[B, K]".
void check_array(const char* name, int device, nb::dlpack::dtype given, nb::dlpack::dtype dtype, const int64_t* shape,
                 size_t ndim, size_t expected_ndim, const char* expected);

void check_shape(const char* name, const int64_t* shape, const int64_t* expected, size_t ndim);

void check_contiguous(const char* name, const int64_t* shape, const int64_t* strides, size_t ndim);

// The last axis lies in one piece, whatever the strides of the others.
void check_dense_rows(const char* name, const int64_t* shape, const int64_t* strides, size_t ndim);

void check_threads(int threads);

template <typename T, size_t N> struct View {
    const char* name;
    T* data;
    std::array<int64_t, N> shape;
    std::array<int64_t, N> stride;  // in elements

    void require_shape(const std::array<int64_t, N>& expected) const {
        check_shape(name, shape.data(), expected.data(), N);
    }

    void require_contiguous() const { check_contiguous(name, shape.data(), stride.data(), N); }

    void require_dense_rows() const { check_dense_rows(name, shape.data(), stride.data(), N); }

    // The first element of a row, given the numbers on all axes but the last.
    template <typename... Index> T* row(Index... index) const {
        static_assert(sizeof...(Index) + 1 == N || sizeof...(Index) == N);
        const int64_t numbers[] = {index...};
        int64_t offset = 0;
        for (size_t i = 0; i < sizeof...(Index); ++i) offset += numbers[i] * stride[i];
        return data + offset;
    }
};

using Ids = View<const int64_t, 2>;  // [B, K]

// Every id is one of 0..count-1.
void check_ids(const Ids& ids, int64_t count);

template <typename T, size_t N, typename Array>
View<T, N> view(const char* name, const Array& array, const char* expected) {
    check_array(name, array.device_type(), array.dtype(), nb::dtype<T>(), array.shape_ptr(), array.ndim(), N, expected);
    View<T, N> result{name, static_cast<T*>(array.data()), {}, {}};
    for (size_t i = 0; i < N; ++i) {
        result.shape[i] = array.shape_ptr()[i];
        result.stride[i] = array.stride(i);
    }
    return result;
}

template <typename T, size_t N, typename Array>
std::optional<View<T, N>> view(const char* name, const Maybe<Array>& array, const char* expected) {
    if (!array) return std::nullopt;
    return view<T, N>(name, *array, expected);
}

void bind_add_layer_norm(nb::module_& module);
void bind_attention(nb::module_& module);
void bind_decoder_tokens(nb::module_& module);
void bind_gelu_linear(nb::module_& module);
void bind_masked_loss(nb::module_& module);
void bind_patch_embed(nb::module_& module);
void bind_position(nb::module_& module);
void bind_random_masking(nb::module_& module);

}  // namespace mmmae

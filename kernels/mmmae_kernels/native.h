// What the ops' native code shares: views of tensors, and the checks that come before any write.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <array>
#include <cstdint>
#include <string>

namespace mmmae {

namespace nb = nanobind;

using Input = nb::ndarray<nb::ro>;
using Output = nb::ndarray<>;

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
};

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

void bind_patch_embed(nb::module_& module);

}  // namespace mmmae

// The compiled CPU library: one Python module, filled by the ops' own cpu.cpp.
#include "cpu/arrays.h"

#include <omp.h>

namespace mmmae {

void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

std::string to_string(const int64_t* sizes, size_t count) {
    std::string text = "[";
    for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + "]";
}

static std::string to_string(nb::dlpack::dtype dtype) {
    const char* kind = "";
    switch (static_cast<nb::dlpack::dtype_code>(dtype.code)) {
        case nb::dlpack::dtype_code::Int: kind = "int"; break;
        case nb::dlpack::dtype_code::UInt: kind = "uint"; break;
        case nb::dlpack::dtype_code::Float: kind = "float"; break;
        case nb::dlpack::dtype_code::Bfloat: kind = "bfloat"; break;
        case nb::dlpack::dtype_code::Complex: kind = "complex"; break;
        case nb::dlpack::dtype_code::Bool: return "bool";
        default: return "dlpack dtype " + std::to_string(dtype.code) + " of " + std::to_string(dtype.bits) + " bits";
    }
    return kind + std::to_string(dtype.bits);
}

void check_array(const char* name, int device, nb::dlpack::dtype given, nb::dlpack::dtype dtype, const int64_t* shape,
                 size_t ndim, size_t expected_ndim, const char* expected) {
    // Page-locked memory is the CPU's too.
    if (device != nb::device::cpu::value && device != nb::device::cuda_host::value &&
        device != nb::device::rocm_host::value)
        fail(std::string(name) + ": lies on device type " + std::to_string(device) + " of dlpack, expected is the CPU");
    if (given != dtype) fail(std::string(name) + ": dtype is " + to_string(given) + ", expected is " + to_string(dtype));
    if (ndim != expected_ndim)
        fail(std::string(name) + ": shape is " + to_string(shape, ndim) + ", expected is " + expected);
}

void check_shape(const char* name, const int64_t* shape, const int64_t* expected, size_t ndim) {
    for (size_t i = 0; i < ndim; ++i)
        if (shape[i] != expected[i])
            fail(std::string(name) + ": shape is " + to_string(shape, ndim) + ", expected is " + to_string(expected, ndim));
}

void check_contiguous(const char* name, const int64_t* shape, const int64_t* strides, size_t ndim) {
    for (size_t i = 0; i < ndim; ++i)
        if (shape[i] == 0) return;
    int64_t expected = 1;
    for (size_t i = ndim; i-- > 0; expected *= shape[i])
        if (shape[i] != 1 && strides[i] != expected)
            fail(std::string(name) + ": strides are " + to_string(strides, ndim) + " for shape " +
                 to_string(shape, ndim) + ", expected is contiguous memory");
}

void check_dense_rows(const char* name, const int64_t* shape, const int64_t* strides, size_t ndim) {
    for (size_t i = 0; i < ndim; ++i)
        if (shape[i] == 0) return;
    if (shape[ndim - 1] != 1 && strides[ndim - 1] != 1)
        fail(std::string(name) + ": strides are " + to_string(strides, ndim) + " for shape " + to_string(shape, ndim) +
             ", expected is 1 for the last axis");
}

void check_ids(const Ids& ids, int64_t count) {
    for (int64_t b = 0; b < ids.shape[0]; ++b)
        for (int64_t k = 0; k < ids.shape[1]; ++k) {
            const int64_t id = *ids.row(b, k);
            if (id < 0 || id >= count)
                fail(std::string(ids.name) + ": " + std::to_string(id) + " at [" + std::to_string(b) + ", " +
                     std::to_string(k) + "] is outside 0.." + std::to_string(count - 1));
        }
}

void check_threads(int threads) {
    if (threads < 1) fail("threads: " + std::to_string(threads) + " given, expected is at least 1");
}

static int team_size(int threads) {
    check_threads(threads);
    int size = 0;
#pragma omp parallel num_threads(threads)
#pragma omp single
    size = omp_get_num_threads();
    return size;
}

}  // namespace mmmae

NB_MODULE(_native, module) {
    module.doc() = "Native CPU kernels; mmmae_kernels.cpu.library loads them.";
    module.def("team_size", &mmmae::team_size, nanobind::arg("threads"), nanobind::call_guard<nanobind::gil_scoped_release>(),
               "How many threads OpenMP gives to a call that asks for `threads`.");
    mmmae::bind_add_layer_norm(module);
    mmmae::bind_attention(module);
    mmmae::bind_decoder_tokens(module);
    mmmae::bind_gelu_linear(module);
    mmmae::bind_masked_loss(module);
    mmmae::bind_patch_embed(module);
    mmmae::bind_position(module);
    mmmae::bind_random_masking(module);
}

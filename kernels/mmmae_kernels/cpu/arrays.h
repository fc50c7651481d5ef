// Tensors as Python passes them, and the checks that the ops' native code makes before it writes.
//
// Python passes a tensor as its address, and with strides if they may be arbitrary. It has checked shapes, dtypes and
// devices; token numbers and the number of threads are checked here.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
#include <string>

// Compiles a function for AVX-512, AVX2 and the baseline instruction set; the loader chooses the best that the CPU has.
// For leaf functions on plain pointers with loops that the compiler vectorises.
#ifdef MMMAE_CLONES
#define MMMAE_VECTOR __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MMMAE_VECTOR
#endif

namespace mmmae {

namespace nb = nanobind;

// Tensor.data_ptr(); 0 for None and for an empty tensor.
using Address = uintptr_t;
template <size_t N> using Sizes = std::array<int64_t, N>;

// For fewer copied elements a second thread costs more than it saves.
constexpr int64_t PARALLEL_ELEMENTS = 32768;

// Raises Python's ValueError.
[[noreturn]] void fail(const std::string& message);

void check_threads(int threads);

template <typename T> T* pointer(Address address) { return reinterpret_cast<T*>(address); }

// A tensor with N strided axes (in elements); the axes after them are contiguous.
template <typename T, size_t N> struct View {
    T* data;
    Sizes<N> stride;

    View(Address address, const Sizes<N>& strides) : data(pointer<T>(address)), stride(strides) {}

    explicit operator bool() const { return data != nullptr; }

    template <typename... Index> T* at(Index... index) const {
        static_assert(sizeof...(Index) == N);
        const int64_t numbers[] = {index...};
        int64_t offset = 0;
        for (size_t i = 0; i < N; ++i) offset += numbers[i] * stride[i];
        return data + offset;
    }
};

using Ids = View<const int64_t, 2>;  // [B, K]

// Raises unless each of the ids [batch, keep] is in 0..count-1.
void check_ids(const char* name, const Ids& ids, int64_t batch, int64_t keep, int64_t count);

void bind_add_layer_norm(nb::module_& module);
void bind_attention(nb::module_& module);
void bind_decoder_tokens(nb::module_& module);
void bind_gelu_linear(nb::module_& module);
void bind_masked_loss(nb::module_& module);
void bind_patch_embed(nb::module_& module);
void bind_position(nb::module_& module);
void bind_random_masking(nb::module_& module);
void bind_rows(nb::module_& module);

}  // namespace mmmae

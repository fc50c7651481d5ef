// What the ops' native code shares: tensors as Python passes them, and the checks that come before any write.
//
// Python passes a tensor by its address, and its strides where they may be any. Shapes, dtypes and devices were checked
// there; what is left to check here are numbers that lie in memory, and the thread count.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
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

// Tensor.data_ptr(); 0 for None, and for a tensor of no elements.
using Address = uintptr_t;
template <size_t N> using Sizes = std::array<int64_t, N>;

// Below this number of copied elements a second thread costs more than it saves.
constexpr int64_t PARALLEL_ELEMENTS = 32768;

// Raises Python's ValueError.
[[noreturn]] void fail(const std::string& message);

void check_threads(int threads);

template <typename T> T* pointer(Address address) { return reinterpret_cast<T*>(address); }

// A tensor with N axes that have strides (in elements); what comes behind them lies in one piece.
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

using Rows = View<const float, 2>;  // [A, B, D]
using Ids = View<const int64_t, 2>;  // [B, K]

// Raises unless each of the ids [batch, keep] is one of 0..count-1.
void check_ids(const char* name, const Ids& ids, int64_t batch, int64_t keep, int64_t count);

void bind_add_layer_norm(nb::module_& module);
void bind_attention(nb::module_& module);
void bind_decoder_tokens(nb::module_& module);
void bind_gelu_linear(nb::module_& module);
void bind_masked_loss(nb::module_& module);
void bind_patch_embed(nb::module_& module);
void bind_position(nb::module_& module);
void bind_random_masking(nb::module_& module);

}  // namespace mmmae

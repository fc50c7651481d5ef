// Rows of float32, bfloat16 or float16, which the kernels read and write in float32.
//
// Most kernels exist once, for rows of float. A float32 row is read and written where it is. A row of another dtype is
// widened into a buffer before, or rounded from a buffer after; the buffers stay in the core's caches. GELU, which is
// bound by arithmetic, exists once for each type of numbers instead (halves.h).
#pragma once

#include "cpu/arrays.h"

#include <omp.h>

#include <cstddef>
#include <cstring>
#include <memory>

namespace mmmae {

// The numbers that cpu/library.py gives to torch's dtypes. Rows are of the first three; integers are copied or
// converted to them.
enum Dtype : int { FLOAT32, BFLOAT16, FLOAT16, INT16, UINT8 };
template <size_t N> using Dtypes = std::array<int, N>;

inline int64_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : dtype == UINT8 ? 1 : 2; }

template <size_t N> bool any_half(const Dtypes<N>& dtypes) {
    for (int dtype : dtypes)
        if (dtype != FLOAT32) return true;
    return false;
}

// out = row, where row is of bfloat16 or float16.
void widen(float* out, const void* row, int dtype, int64_t width);

// out = row rounded to bfloat16 or float16: to the nearest, and of two to the even one. NaN remains NaN.
void narrow(void* out, const float* row, int dtype, int64_t width);

// COUNT buffers of a row for each thread; no memory unless a dtype needs it.
class Buffers {
  public:
    Buffers(bool needed, int threads, int64_t count, int64_t width)
        : count_(count), stride_(needed ? (width + 31) / 16 * 16 : 0), rows_(new float[threads * count * stride_]) {}

    // Returns a buffer of the calling thread.
    float* operator[](int64_t number) const { return rows_.get() + (omp_get_thread_num() * count_ + number) * stride_; }

  private:
    int64_t count_, stride_;  // a multiple of 16 and longer than a row, so that rows of 4 KB don't share cache sets
    std::unique_ptr<float[]> rows_;
};

// Rows to read, [A, B, D] with strides of the first two axes.
class Input {
  public:
    Input(Address address, const Sizes<2>& strides, int dtype, int64_t width)
        : data_(pointer<const std::byte>(address)), stride_(strides), dtype_(dtype), width_(width) {}

    explicit operator bool() const { return data_ != nullptr; }

    // Returns a row in float32, which is in the buffer or where it was.
    const float* row(int64_t a, int64_t b, float* buffer) const {
        const std::byte* row = at(a, b);
        if (dtype_ == FLOAT32) return reinterpret_cast<const float*>(row);
        widen(buffer, row, dtype_, width_);
        return buffer;
    }

    const std::byte* at(int64_t a, int64_t b) const {
        return data_ + (a * stride_[0] + b * stride_[1]) * size_of(dtype_);
    }

  private:
    const std::byte* data_;
    Sizes<2> stride_;
    int dtype_;
    int64_t width_;
};

// Contiguous rows to write, [R, D].
class Output {
  public:
    Output(Address address, int dtype, int64_t width)
        : data_(pointer<std::byte>(address)), dtype_(dtype), width_(width) {}

    explicit operator bool() const { return data_ != nullptr; }
    bool in_place() const { return dtype_ == FLOAT32; }

    // Returns where to write a row in float32; then `store` it.
    float* row(int64_t number, float* buffer) const {
        return in_place() ? reinterpret_cast<float*>(at(number)) : buffer;
    }

    // Returns the same with the row's present contents.
    float* load(int64_t number, float* buffer) const {
        if (!in_place()) widen(buffer, at(number), dtype_, width_);
        return row(number, buffer);
    }

    // Writes a row, unless it is the one that `row` returned without a buffer.
    void store(int64_t number, const float* row) const {
        std::byte* target = at(number);
        if (!in_place())
            narrow(target, row, dtype_, width_);
        else if (reinterpret_cast<const std::byte*>(row) != target)
            std::memcpy(target, row, width_ * sizeof(float));
    }

    std::byte* at(int64_t number) const { return data_ + number * width_ * size_of(dtype_); }

  private:
    std::byte* data_;
    int dtype_;
    int64_t width_;
};

}  // namespace mmmae

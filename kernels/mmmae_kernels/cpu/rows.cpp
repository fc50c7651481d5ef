#include "cpu/rows.h"

#include <algorithm>

namespace mmmae {

MMMAE_VECTOR float sum(const float* __restrict row, int64_t width) {
    return sum_of(width, [=](int64_t i) { return row[i]; });
}

MMMAE_VECTOR float squares(const float* __restrict row, float mean, int64_t width) {
    return sum_of(width, [=](int64_t i) { return (row[i] - mean) * (row[i] - mean); });
}

MMMAE_VECTOR void add(float* __restrict out, const float* __restrict a, const float* __restrict b, int64_t width) {
    for (int64_t i = 0; i < width; ++i) out[i] = a[i] + b[i];
}

MMMAE_VECTOR void accumulate(float* __restrict sum, const float* __restrict row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) sum[i] += row[i];
}

MMMAE_VECTOR static void accumulate(double* __restrict sum, const float* __restrict row, int64_t width) {
    for (int64_t i = 0; i < width; ++i) sum[i] += row[i];
}

int64_t ColumnSums::parts(int64_t rows) { return std::clamp<int64_t>(rows / (2 * ROWS), 1, PARTS); }

void ColumnSums::begin(int64_t part) {
    float* recent = sums_.get() + 2 * part * width_;
    std::fill(recent, recent + 2 * width_, 0.0f);
}

void ColumnSums::flush(int64_t part) {
    float* recent = sums_.get() + 2 * part * width_;
    accumulate(recent + width_, recent, width_);
    std::fill(recent, recent + width_, 0.0f);
    rows_[part] = 0;
}

void ColumnSums::store(float* out) {
    for (int64_t part = 0; part < parts_; ++part) {
        flush(part);
        accumulate(total_.data(), sums_.get() + (2 * part + 1) * width_, width_);
    }
    std::copy(total_.begin(), total_.end(), out);
}

}  // namespace mmmae

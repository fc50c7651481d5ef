// Functions on rows of floats that several ops use, compiled for each instruction set.
#pragma once

#include "cpu/arrays.h"

#include <memory>
#include <vector>

namespace mmmae {

// Returns the sum of term(i) over a row. Four quarters are added side by side, because a single running sum would wait
// for each addition to finish. The order of the sum depends only on the width and the instruction set. For use in
// functions marked MMMAE_VECTOR; term may write to memory that only it reads.
template <typename Term> [[gnu::always_inline]] inline float sum_of(int64_t width, Term term) {
    const int64_t quarter = width / 4;
    float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0, rest = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t i = 0; i < quarter; ++i) {
        sum0 += term(i);
        sum1 += term(i + quarter);
        sum2 += term(i + 2 * quarter);
        sum3 += term(i + 3 * quarter);
    }
    for (int64_t i = 4 * quarter; i < width; ++i) rest += term(i);
    return (sum0 + sum1) + (sum2 + sum3) + rest;
}

// Return the sum of a row, and the sum of its squared differences from the mean.
float sum(const float* row, int64_t width);
float squares(const float* row, float mean, int64_t width);

// out = a + b
void add(float* out, const float* a, const float* b, int64_t width);

// sum += row
void accumulate(float* sum, const float* row, int64_t width);

// Adds up rows, column by column, with rounding errors that hardly grow with the number of rows: up to ROWS rows are
// added in float, these sums are added in float within one of PARTS parts, and the parts in double. The caller decides
// which rows belong to a part; if that does not depend on the number of threads, neither does the result.
class ColumnSums {
  public:
    static constexpr int64_t ROWS = 32, PARTS = 64;

    // Returns the number of parts for this many rows.
    static int64_t parts(int64_t rows);

    ColumnSums(int64_t parts, int64_t width)
        : parts_(parts), width_(width), sums_(new float[2 * parts * width]), total_(width), rows_(parts) {}

    // To be called before the first row of a part by the thread that adds to it, so that this thread touches the memory
    // first.
    void begin(int64_t part);

    // Returns the sum to which the caller adds the next row of a part, or the sum of a few rows.
    float* recent(int64_t part) {
        if (rows_[part] == ROWS) flush(part);
        ++rows_[part];
        return sums_.get() + 2 * part * width_;
    }

    void store(float* out);

  private:
    void flush(int64_t part);

    int64_t parts_, width_;
    std::unique_ptr<float[]> sums_;  // [parts, 2, width]: sums of the recent rows, and of those before
    std::vector<double> total_;
    std::vector<int64_t> rows_;
};

}  // namespace mmmae

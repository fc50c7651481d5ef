// What several ops do with rows of floats, compiled for each instruction set.
#pragma once

#include "cpu/arrays.h"

#include <memory>
#include <vector>

namespace mmmae {

// Sum of term(i) over a row, by four quarters side by side: one running sum would wait for each addition to end. The order
// depends on the width and the instruction set alone. For functions
// marked MMMAE_VECTOR; term may write where it alone reads.
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

// The sum of a row, and of the squares of its differences from its mean.
float sum(const float* row, int64_t width);
float squares(const float* row, float mean, int64_t width);

// out = a + b
void add(float* out, const float* a, const float* b, int64_t width);

// sum += row
void accumulate(float* sum, const float* row, int64_t width);

// Sums of rows, column by column, with rounding errors that hardly grow with the number of rows: up to ROWS of them are
// added in float, such sums again in float by one of PARTS, the parts in double. Which rows make a part is the caller's to
// fix; then the sum is the same for any number of threads.
class ColumnSums {
  public:
    static constexpr int64_t ROWS = 32, PARTS = 64;

    // How many parts serve this many rows.
    static int64_t parts(int64_t rows);

    ColumnSums(int64_t parts, int64_t width)
        : parts_(parts), width_(width), sums_(new float[2 * parts * width]), total_(width), rows_(parts) {}

    // Comes before the part's first row, on the thread that adds to it: its memory is cleared where it is used.
    void begin(int64_t part);

    // For adding a row, or the sum of a few, to a part oneself: the sum to add it to.
    float* recent(int64_t part) {
        if (rows_[part] == ROWS) flush(part);
        ++rows_[part];
        return sums_.get() + 2 * part * width_;
    }

    void store(float* out);

  private:
    void flush(int64_t part);

    int64_t parts_, width_;
    std::unique_ptr<float[]> sums_;  // [parts, 2, width]: of the recent rows, of those before
    std::vector<double> total_;
    std::vector<int64_t> rows_;
};

}  // namespace mmmae

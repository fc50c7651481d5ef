// What several ops do with rows of floats, compiled for each instruction set.
#pragma once

#include "native.h"

#include <vector>

namespace mmmae {

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

    ColumnSums(int64_t parts, int64_t width) : parts_(parts), width_(width), sums_(2 * parts * width), total_(width), rows_(parts) {}

    // For adding one row to a part oneself: the sum to add it to.
    float* recent(int64_t part) {
        if (rows_[part] == ROWS) flush(part);
        ++rows_[part];
        return sums_.data() + 2 * part * width_;
    }

    void store(float* out);

  private:
    void flush(int64_t part);

    int64_t parts_, width_;
    std::vector<float> sums_;  // [parts, 2, width]: of the recent rows, of those before
    std::vector<double> total_;
    std::vector<int64_t> rows_;
};

}  // namespace mmmae

// Position embeddings, added to tokens in place, and the gradients of position and bias.
#include "cpu/arrays.h"
#include "cpu/rows.h"

#include <nanobind/stl/array.h>

#include <algorithm>
#include <vector>

namespace mmmae {

static void add_position(Address tokens_address, Address ids_address, Sizes<2> ids_strides, Address position_address,
                         int64_t position_stride, Sizes<3> sizes, int64_t positions, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t keep = sizes[1], rows = sizes[0] * keep, width = sizes[2];
    const Ids ids(ids_address, ids_strides);
    const auto* position = pointer<const float>(position_address);
    check_ids("ids", ids, sizes[0], keep, positions);
    auto* tokens = pointer<float>(tokens_address);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row)
        accumulate(tokens + row * width, position + *ids.at(row / keep, row % keep) * position_stride, width);
}

// Rows of a gradient sorted by token number, those with the same number in the order of ids.
struct Grouped {
    std::vector<int64_t> first;  // [N+1]: index of a token's first row in `row`
    std::vector<int64_t> row;    // [B*K]: row numbers

    Grouped(const Ids& ids, int64_t batch, int64_t keep, int64_t tokens) : first(tokens + 1), row(batch * keep) {
        for (int64_t number = 0; number < batch * keep; ++number) ++first[*ids.at(number / keep, number % keep) + 1];
        for (int64_t n = 0; n < tokens; ++n) first[n + 1] += first[n];
        std::vector<int64_t> next(first);
        for (int64_t number = 0; number < batch * keep; ++number)
            row[next[*ids.at(number / keep, number % keep)]++] = number;
    }
};

static void embedding_gradients(Address grad_address, Sizes<2> grad_strides, Address ids_address, Sizes<2> ids_strides,
                                Address grad_position_address, Address grad_bias_address, Sizes<3> sizes,
                                int64_t tokens, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t keep = sizes[1], rows = sizes[0] * keep, width = sizes[2];
    const Rows grad(grad_address, grad_strides);
    const Ids ids(ids_address, ids_strides);
    check_ids("ids", ids, sizes[0], keep, tokens);
    auto *position = pointer<float>(grad_position_address), *bias = pointer<float>(grad_bias_address);
    const Grouped grouped(ids, sizes[0], keep, tokens);
    const int64_t parts = ColumnSums::parts(rows + tokens);
    ColumnSums biases(bias ? parts : 0, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t part = 0; part < parts; ++part) {
        if (bias) biases.begin(part);
        for (int64_t n = tokens * part / parts; n < tokens * (part + 1) / parts; ++n) {
            float* sum = position + n * width;
            std::fill(sum, sum + width, 0.0f);
            for (int64_t i = grouped.first[n]; i < grouped.first[n + 1]; ++i)
                accumulate(sum, grad.at(grouped.row[i] / keep, grouped.row[i] % keep), width);
            if (bias) accumulate(biases.recent(part), sum, width);
        }
    }
    if (bias) biases.store(bias);
}

static void sum_of_rows(Address grad_address, Sizes<2> grad_strides, Address out_address, Sizes<3> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t keep = sizes[1], rows = sizes[0] * keep, width = sizes[2];
    const Rows grad(grad_address, grad_strides);
    const int64_t parts = ColumnSums::parts(rows);
    ColumnSums sums(parts, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t part = 0; part < parts; ++part) {
        sums.begin(part);
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
            accumulate(sums.recent(part), grad.at(row / keep, row % keep), width);
    }
    sums.store(pointer<float>(out_address));
}

void bind_position(nb::module_& module) {
    module.def("add_position", &add_position, nb::arg("tokens"), nb::arg("ids"), nb::arg("ids_strides"),
               nb::arg("position"), nb::arg("position_stride"), nb::arg("sizes"), nb::arg("positions"),
               nb::arg("threads"));
    module.def("embedding_gradients", &embedding_gradients, nb::arg("grad"), nb::arg("grad_strides"), nb::arg("ids"),
               nb::arg("ids_strides"), nb::arg("grad_position"), nb::arg("grad_bias"), nb::arg("sizes"),
               nb::arg("tokens"), nb::arg("threads"));
    module.def("sum_of_rows", &sum_of_rows, nb::arg("grad"), nb::arg("grad_strides"), nb::arg("out"), nb::arg("sizes"),
               nb::arg("threads"));
}

}  // namespace mmmae

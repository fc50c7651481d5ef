// Position embeddings, added to tokens in place, and the gradients of position and bias.
#include "cpu/floats.h"
#include "cpu/rows.h"

#include <nanobind/stl/array.h>

#include <algorithm>
#include <vector>

namespace mmmae {

static void add_position(Address tokens_address, Address ids_address, Sizes<2> ids_strides, Address position_address,
                         int64_t position_stride, Address out_address, Dtypes<3> dtypes, Sizes<3> sizes,
                         int64_t positions, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t keep = sizes[1], rows = sizes[0] * keep, width = sizes[2];
    const Ids ids(ids_address, ids_strides);
    check_ids("ids", ids, sizes[0], keep, positions);
    const Output out(out_address, dtypes[2], width);
    const Input tokens(tokens_address, {0, width}, dtypes[0], width);
    const Input position(position_address, {0, position_stride}, dtypes[1], width);
    const Buffers buffers(any_half(dtypes), threads, 3, width);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row) {
        const float* added = position.row(0, *ids.at(row / keep, row % keep), buffers[1]);
        const float* token = tokens.row(0, row, buffers[0]);
        float* sum = out.row(row, buffers[2]);
        if (sum == token)
            accumulate(sum, added, width);
        else
            add(sum, token, added, width);
        out.store(row, sum);
    }
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
                                Address grad_position_address, Address grad_bias_address, int dtype, Sizes<3> sizes,
                                int64_t tokens, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t keep = sizes[1], rows = sizes[0] * keep, width = sizes[2];
    const Input grad(grad_address, grad_strides, dtype, width);
    const Ids ids(ids_address, ids_strides);
    check_ids("ids", ids, sizes[0], keep, tokens);
    const Output position(grad_position_address, dtype, width);
    auto* bias = pointer<float>(grad_bias_address);
    const Buffers buffers(dtype != FLOAT32, threads, 2, width);
    const Grouped grouped(ids, sizes[0], keep, tokens);
    const int64_t parts = ColumnSums::parts(rows + tokens);
    ColumnSums biases(bias ? parts : 0, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t part = 0; part < parts; ++part) {
        if (bias) biases.begin(part);
        for (int64_t n = tokens * part / parts; n < tokens * (part + 1) / parts; ++n) {
            float* sum = position.row(n, buffers[1]);
            std::fill(sum, sum + width, 0.0f);
            for (int64_t i = grouped.first[n]; i < grouped.first[n + 1]; ++i)
                accumulate(sum, grad.row(grouped.row[i] / keep, grouped.row[i] % keep, buffers[0]), width);
            if (bias) accumulate(biases.recent(part), sum, width);
            position.store(n, sum);
        }
    }
    if (bias) biases.store(bias);
}

void bind_position(nb::module_& module) {
    module.def("add_position", &add_position, nb::arg("tokens"), nb::arg("ids"), nb::arg("ids_strides"),
               nb::arg("position"), nb::arg("position_stride"), nb::arg("out"), nb::arg("dtypes"), nb::arg("sizes"),
               nb::arg("positions"), nb::arg("threads"));
    module.def("embedding_gradients", &embedding_gradients, nb::arg("grad"), nb::arg("grad_strides"), nb::arg("ids"),
               nb::arg("ids_strides"), nb::arg("grad_position"), nb::arg("grad_bias"), nb::arg("dtype"),
               nb::arg("sizes"), nb::arg("tokens"), nb::arg("threads"));
}

}  // namespace mmmae

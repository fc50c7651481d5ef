// Position embeddings added to chosen tokens in place, and the gradients of position and bias.
#include "cpu/arrays.h"
#include "cpu/rows.h"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <vector>

namespace mmmae {

static void add_position(const Output& tokens_array, const Input& ids_array, const Input& position_array, int threads) {
    const auto tokens = view<float, 3>("tokens", tokens_array, "[B, K, D]");
    const auto ids = view<const int64_t, 2>("ids", ids_array, "[B, K]");
    const auto position = view<const float, 2>("position", position_array, "[N, D]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t keep = tokens.shape[1], rows = tokens.shape[0] * keep, width = tokens.shape[2];
    tokens.require_contiguous();
    ids.require_shape({tokens.shape[0], keep});
    position.require_shape({position.shape[0], width});
    position.require_dense_rows();
    check_ids(ids, position.shape[0]);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row)
        accumulate(tokens.data + row * width, position.row(*ids.row(row / keep, row % keep)), width);
}

// The rows of a gradient in the order of the tokens that they are of, those of one token in the order of ids.
struct Grouped {
    std::vector<int64_t> first;  // [N+1]: where a token's rows begin
    std::vector<int64_t> row;    // [B*K]

    Grouped(const Ids& ids, int64_t tokens) : first(tokens + 1), row(ids.shape[0] * ids.shape[1]) {
        for_each(ids, [&](int64_t id, int64_t) { ++first[id + 1]; });
        for (int64_t n = 0; n < tokens; ++n) first[n + 1] += first[n];
        std::vector<int64_t> next(first);
        for_each(ids, [&](int64_t id, int64_t number) { row[next[id]++] = number; });
    }

  private:
    template <typename Body> static void for_each(const Ids& ids, Body body) {
        int64_t number = 0;
        for (int64_t b = 0; b < ids.shape[0]; ++b)
            for (int64_t k = 0; k < ids.shape[1]; ++k) body(*ids.row(b, k), number++);
    }
};

static void embedding_gradients(const Input& grad_array, const Input& ids_array, const Output& position_array,
                                const Maybe<Output>& bias_array, int threads) {
    const auto grad = view<const float, 3>("grad", grad_array, "[B, K, D]");
    const auto ids = view<const int64_t, 2>("ids", ids_array, "[B, K]");
    const auto position = view<float, 2>("grad_position", position_array, "[N, D]");
    const auto bias = view<float, 1>("grad_bias", bias_array, "[D]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t keep = grad.shape[1], rows = grad.shape[0] * keep, width = grad.shape[2], tokens = position.shape[0];
    ids.require_shape({grad.shape[0], keep});
    grad.require_dense_rows();
    position.require_shape({tokens, width});
    position.require_contiguous();
    if (bias) {
        bias->require_shape({width});
        bias->require_contiguous();
    }
    check_ids(ids, tokens);
    const Grouped grouped(ids, tokens);
    const int64_t parts = ColumnSums::parts(rows + tokens);
    ColumnSums biases(bias ? parts : 0, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t part = 0; part < parts; ++part) {
        if (bias) biases.begin(part);
        for (int64_t n = tokens * part / parts; n < tokens * (part + 1) / parts; ++n) {
            float* sum = position.row(n);
            std::fill(sum, sum + width, 0.0f);
            for (int64_t i = grouped.first[n]; i < grouped.first[n + 1]; ++i)
                accumulate(sum, grad.row(grouped.row[i] / keep, grouped.row[i] % keep), width);
            if (bias) accumulate(biases.recent(part), sum, width);
        }
    }
    if (bias) biases.store(bias->data);
}

static void sum_of_rows(const Input& grad_array, const Output& out_array, int threads) {
    const auto grad = view<const float, 3>("grad", grad_array, "[B, K, D]");
    const auto out = view<float, 1>("out", out_array, "[D]");
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t keep = grad.shape[1], rows = grad.shape[0] * keep, width = grad.shape[2];
    grad.require_dense_rows();
    out.require_shape({width});
    out.require_contiguous();
    const int64_t parts = ColumnSums::parts(rows);
    ColumnSums sums(parts, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (rows * width >= PARALLEL_ELEMENTS)
    for (int64_t part = 0; part < parts; ++part) {
        sums.begin(part);
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
            accumulate(sums.recent(part), grad.row(row / keep, row % keep), width);
    }
    sums.store(out.data);
}

void bind_position(nb::module_& module) {
    module.def("add_position", &add_position, nb::arg("tokens"), nb::arg("ids"), nb::arg("position"), nb::arg("threads"));
    module.def("embedding_gradients", &embedding_gradients, nb::arg("grad"), nb::arg("ids"), nb::arg("grad_position"),
               nb::arg("grad_bias").none(), nb::arg("threads"));
    module.def("sum_of_rows", &sum_of_rows, nb::arg("grad"), nb::arg("out"), nb::arg("threads"));
}

}  // namespace mmmae

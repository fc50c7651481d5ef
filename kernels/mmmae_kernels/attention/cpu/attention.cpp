// Attention of queries to keys and its gradients, never with all scores in memory: heads and blocks of queries on threads.
#include "cpu/arrays.h"
#include "head.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

namespace mmmae {
namespace {

using attention::Level;

// What a thread costs, in multiply-adds.
constexpr int64_t PARALLEL_PRODUCTS = 1 << 18;
constexpr size_t ALIGNMENT = 64;

// Those that this CPU can run, best first.
std::vector<const Level*> levels() {
    std::vector<const Level*> found;
#ifdef MMMAE_ATTENTION_LEVELS
    if (__builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2")) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl"))
            found.push_back(&attention::level_avx512);
        found.push_back(&attention::level_avx2);
    }
#endif
    found.push_back(&attention::level_plain);
    return found;
}

const Level& level_named(const std::string& name) {
    for (const Level* level : levels())
        if (name.empty() || name == level->name) return *level;
    fail("level: " + name + " is none of this CPU's");
}

// Scratch memory of every thread, allocated before they start: an exception must not leave a parallel region.
class Scratch {
  public:
    Scratch(int threads, int64_t floats)
        : floats_(floats),
          memory_(static_cast<float*>(::operator new(threads * floats * sizeof(float), std::align_val_t{ALIGNMENT}))) {}

    float* mine() const { return memory_.get() + omp_get_thread_num() * floats_; }

  private:
    struct Delete {
        void operator()(float* memory) const { ::operator delete(memory, std::align_val_t{ALIGNMENT}); }
    };

    int64_t floats_;
    std::unique_ptr<float, Delete> memory_;
};

// The keys that each sample has.
class Present {
  public:
    Present(const std::optional<View<const bool, 2>>& key_present, int64_t batch, int64_t keys)
        : keys_(keys), some_(key_present.has_value()), numbers_(some_ ? batch * keys : 0), counts_(batch, keys) {
        for (int64_t b = 0; some_ && b < batch; ++b) {
            counts_[b] = 0;
            for (int64_t key = 0; key < keys; ++key)
                if (*key_present->row(b, key)) numbers_[b * keys + counts_[b]++] = key;
        }
    }

    attention::Keys of(int64_t b, int64_t head, const View<const float, 4>& k, const View<const float, 4>& v) const {
        const int64_t* present = some_ && counts_[b] < keys_ ? numbers_.data() + b * keys_ : nullptr;
        return {{k.row(b, 0, head), k.stride[1]}, {v.row(b, 0, head), v.stride[1]}, k.shape[3], keys_, counts_[b], present};
    }

  private:
    int64_t keys_;
    bool some_;
    std::vector<int64_t> numbers_, counts_;
};

// Blocks of about the same length, which depends on nothing but the number of queries.
int64_t block_of(int64_t queries) {
    const int64_t blocks = std::max<int64_t>(1, (queries + attention::MAX_QUERIES - 1) / attention::MAX_QUERIES);
    const int64_t length = (queries + blocks - 1) / blocks;
    return std::max<int64_t>(1, (length + attention::ROW_STEP - 1) / attention::ROW_STEP) * attention::ROW_STEP;
}

int team(int threads, int64_t tasks, int64_t products) {
    return static_cast<int>(std::max<int64_t>(1, std::min({int64_t{threads}, tasks, products / PARALLEL_PRODUCTS})));
}

void check_inputs(const View<const float, 4>& q, const View<const float, 4>& k, const View<const float, 4>& v,
                  const std::optional<View<const bool, 2>>& key_present) {
    const int64_t width = q.shape[3];
    if (width < 1 || width > attention::MAX_WIDTH)
        fail("q: heads are " + std::to_string(width) + " wide, expected is 1 to " + std::to_string(attention::MAX_WIDTH));
    k.require_shape({q.shape[0], k.shape[1], q.shape[2], width});
    v.require_shape(k.shape);
    for (const auto& input : {q, k, v}) input.require_dense_rows();
    if (key_present) key_present->require_shape({k.shape[0], k.shape[1]});
}

}  // namespace

static void attention_forward(const Input& q_array, const Input& k_array, const Input& v_array,
                              const Maybe<Input>& key_present_array, const Output& out_array, const Output& lse_array,
                              int threads, const std::string& level_name) {
    const auto q = view<const float, 4>("q", q_array, "[B, Nq, h, d]");
    const auto k = view<const float, 4>("k", k_array, "[B, Nk, h, d]");
    const auto v = view<const float, 4>("v", v_array, "[B, Nk, h, d]");
    const auto key_present = view<const bool, 2>("key_present", key_present_array, "[B, Nk]");
    const auto out = view<float, 4>("out", out_array, "[B, Nq, h, d]");
    const auto lse = view<float, 3>("lse", lse_array, "[B, h, Nq]");
    nb::gil_scoped_release release;
    check_threads(threads);
    check_inputs(q, k, v, key_present);
    const int64_t batch = q.shape[0], queries = q.shape[1], heads = q.shape[2], width = q.shape[3], keys = k.shape[1];
    out.require_shape(q.shape);
    out.require_dense_rows();
    lse.require_shape({batch, heads, queries});
    lse.require_contiguous();
    const Level& level = level_named(level_name);
    const Present present(key_present, batch, keys);

    // A head is one task if there are enough of them; else its blocks of queries are shared out.
    const int64_t block = block_of(queries), blocks = (queries + block - 1) / block, wanted = 4 * int64_t{threads};
    const int64_t parts = threads == 1 || batch * heads == 0
                              ? 1
                              : std::max<int64_t>(1, std::min(blocks, (wanted + batch * heads - 1) / (batch * heads)));
    const int64_t tasks = batch * heads * parts;
    const int size = team(threads, tasks, batch * heads * queries * keys * width);
    const Scratch scratch(size, level.forward_scratch(keys, width));
#pragma omp parallel num_threads(size) if (size > 1)
    {
        int64_t packed = -1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t part = task % parts, row = task / parts, b = row / heads, head = row % heads;
            const int64_t first = blocks * part / parts * block;
            const int64_t last = std::min(queries, blocks * (part + 1) / parts * block);
            level.forward({present.of(b, head, k, v),
                           {q.row(b, 0, head), q.stride[1]},
                           {out.row(b, 0, head), out.stride[1]},
                           lse.row(b, head),
                           first,
                           last,
                           block,
                           packed == row},
                          scratch.mine());
            packed = row;
        }
    }
}

static void attention_backward(const Input& grad_array, const Input& q_array, const Input& k_array, const Input& v_array,
                               const Maybe<Input>& key_present_array, const Input& out_array, const Input& lse_array,
                               const Output& grad_q_array, const Output& grad_k_array, const Output& grad_v_array,
                               int threads, const std::string& level_name) {
    const auto grad = view<const float, 4>("grad", grad_array, "[B, Nq, h, d]");
    const auto q = view<const float, 4>("q", q_array, "[B, Nq, h, d]");
    const auto k = view<const float, 4>("k", k_array, "[B, Nk, h, d]");
    const auto v = view<const float, 4>("v", v_array, "[B, Nk, h, d]");
    const auto key_present = view<const bool, 2>("key_present", key_present_array, "[B, Nk]");
    const auto out = view<const float, 4>("out", out_array, "[B, Nq, h, d]");
    const auto lse = view<const float, 3>("lse", lse_array, "[B, h, Nq]");
    const auto grad_q = view<float, 4>("grad_q", grad_q_array, "[B, Nq, h, d]");
    const auto grad_k = view<float, 4>("grad_k", grad_k_array, "[B, Nk, h, d]");
    const auto grad_v = view<float, 4>("grad_v", grad_v_array, "[B, Nk, h, d]");
    nb::gil_scoped_release release;
    check_threads(threads);
    check_inputs(q, k, v, key_present);
    const int64_t batch = q.shape[0], queries = q.shape[1], heads = q.shape[2], width = q.shape[3], keys = k.shape[1];
    for (const auto& input : {grad, out}) {
        input.require_shape(q.shape);
        input.require_dense_rows();
    }
    lse.require_shape({batch, heads, queries});
    lse.require_contiguous();
    grad_q.require_shape(q.shape);
    for (const auto& output : {grad_k, grad_v}) output.require_shape(k.shape);
    for (const auto& output : {grad_q, grad_k, grad_v}) output.require_dense_rows();
    const Level& level = level_named(level_name);
    const Present present(key_present, batch, keys);

    // The gradients of keys are sums over all queries of a head, which one thread takes in order.
    const int64_t block = block_of(queries), tasks = batch * heads;
    const int size = team(threads, tasks, tasks * queries * keys * width);
    const Scratch scratch(size, level.backward_scratch(keys, width));
#pragma omp parallel for num_threads(size) schedule(dynamic) if (size > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t b = task / heads, head = task % heads;
        level.backward({present.of(b, head, k, v),
                        {grad.row(b, 0, head), grad.stride[1]},
                        {q.row(b, 0, head), q.stride[1]},
                        {out.row(b, 0, head), out.stride[1]},
                        lse.row(b, head),
                        {grad_q.row(b, 0, head), grad_q.stride[1]},
                        {grad_k.row(b, 0, head), grad_k.stride[1]},
                        {grad_v.row(b, 0, head), grad_v.stride[1]},
                        queries,
                        block},
                       scratch.mine());
    }
}

static std::vector<std::string> attention_levels() {
    std::vector<std::string> names;
    for (const Level* level : levels()) names.push_back(level->name);
    return names;
}

void bind_attention(nb::module_& module) {
    module.def("attention_forward", &attention_forward, nb::arg("q"), nb::arg("k"), nb::arg("v"),
               nb::arg("key_present").none(), nb::arg("out"), nb::arg("lse"), nb::arg("threads"), nb::arg("level") = "");
    module.def("attention_backward", &attention_backward, nb::arg("grad"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
               nb::arg("key_present").none(), nb::arg("out"), nb::arg("lse"), nb::arg("grad_q"), nb::arg("grad_k"),
               nb::arg("grad_v"), nb::arg("threads"), nb::arg("level") = "");
    module.def("attention_levels", &attention_levels);
}

}  // namespace mmmae

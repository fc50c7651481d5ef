// Attention and its gradients without the whole matrix of scores in memory; threads take heads and blocks of queries.
#include "cpu/arrays.h"
#include "head.h"

#include <nanobind/stl/array.h>
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

// Multiply-adds for which another thread pays off.
constexpr int64_t PARALLEL_PRODUCTS = 1 << 18;
constexpr size_t ALIGNMENT = 64;

using Heads = View<const float, 4>;  // [B, N, h, d]; the last stride, 1, is not read
using WritableHeads = View<float, 4>;

std::vector<const Level*> find_levels() {
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

// The levels that this CPU supports, best first.
const std::vector<const Level*>& levels() {
    static const std::vector<const Level*> found = find_levels();
    return found;
}

const Level& level_at(int64_t number) {
    const int64_t count = static_cast<int64_t>(levels().size());
    if (number < 0 || number >= count)
        fail("level is " + std::to_string(number) + ", expected 0.." + std::to_string(count - 1));
    return *levels()[number];
}

// Scratch memory for all threads, allocated before they start, because an exception must not leave a parallel region.
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

// The present keys of each sample.
class Present {
  public:
    Present(const View<const bool, 2>& key_present, int64_t batch, int64_t keys)
        : keys_(keys), some_(key_present), numbers_(some_ ? batch * keys : 0), counts_(some_ ? batch : 0) {
        for (int64_t b = 0; some_ && b < batch; ++b)
            for (int64_t key = 0; key < keys; ++key)
                if (*key_present.at(b, key)) numbers_[b * keys + counts_[b]++] = key;
    }

    attention::Keys of(int64_t b, int64_t head, const Heads& k, const Heads& v, int64_t width) const {
        const int64_t count = some_ ? counts_[b] : keys_;
        const int64_t* present = count < keys_ ? numbers_.data() + b * keys_ : nullptr;
        return {{k.at(b, 0, head, 0), k.stride[1]}, {v.at(b, 0, head, 0), v.stride[1]}, width, keys_, count, present};
    }

  private:
    int64_t keys_;
    bool some_;
    std::vector<int64_t> numbers_, counts_;
};

// Returns the length of a block of queries. Blocks have about the same length, which depends only on the number of
// queries.
int64_t block_of(int64_t queries) {
    const int64_t blocks = std::max<int64_t>(1, (queries + attention::MAX_QUERIES - 1) / attention::MAX_QUERIES);
    const int64_t length = (queries + blocks - 1) / blocks;
    return std::max<int64_t>(1, (length + attention::ROW_STEP - 1) / attention::ROW_STEP) * attention::ROW_STEP;
}

int team(int threads, int64_t tasks, int64_t products) {
    return static_cast<int>(std::max<int64_t>(1, std::min({int64_t{threads}, tasks, products / PARALLEL_PRODUCTS})));
}

}  // namespace

static void attention_forward(Address q_address, Sizes<4> q_strides, Address k_address, Sizes<4> k_strides,
                              Address v_address, Sizes<4> v_strides, Address key_present_address,
                              Sizes<2> key_present_strides, Address out_address, Address lse_address, Sizes<5> sizes,
                              int threads, int64_t level_number) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const Level& level = level_at(level_number);
    const int64_t batch = sizes[0], queries = sizes[1], keys = sizes[2], heads = sizes[3], width = sizes[4];
    const Heads q(q_address, q_strides), k(k_address, k_strides), v(v_address, v_strides);
    auto *out = pointer<float>(out_address), *lse = pointer<float>(lse_address);
    const Present present(View<const bool, 2>(key_present_address, key_present_strides), batch, keys);

    // A head is one task if there are enough heads for all threads, else its blocks of queries are divided into parts.
    const int64_t block = block_of(queries), blocks = (queries + block - 1) / block, wanted = 4 * int64_t{threads};
    const int64_t parts = threads == 1 || batch * heads == 0
                              ? 1
                              : std::max<int64_t>(1, std::min(blocks, (wanted + batch * heads - 1) / (batch * heads)));
    const int64_t tasks = batch * heads * parts;
    const int size = team(threads, tasks, batch * heads * queries * keys * width);
    const Scratch scratch(size, level.forward_scratch(keys, width));
    const auto run = [&](int64_t task, bool packed) {
        const int64_t part = task % parts, row = task / parts, b = row / heads, head = row % heads;
        const int64_t first = blocks * part / parts * block;
        const int64_t last = std::min(queries, blocks * (part + 1) / parts * block);
        level.forward({present.of(b, head, k, v, width),
                       {q.at(b, 0, head, 0), q.stride[1]},
                       {out + (b * queries * heads + head) * width, heads * width},
                       lse + row * queries,
                       first,
                       last,
                       block,
                       packed},
                      scratch.mine());
    };
#pragma omp parallel num_threads(size) if (size > 1)
    {
        int64_t packed = -1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            run(task, packed == task / parts);
            packed = task / parts;
        }
    }
}

static void attention_backward(Address grad_address, Sizes<4> grad_strides, Address q_address, Sizes<4> q_strides,
                               Address k_address, Sizes<4> k_strides, Address v_address, Sizes<4> v_strides,
                               Address key_present_address, Sizes<2> key_present_strides, Address out_address,
                               Sizes<4> out_strides, Address lse_address, Address grad_q_address,
                               Sizes<4> grad_q_strides, Address grad_k_address, Sizes<4> grad_k_strides,
                               Address grad_v_address, Sizes<4> grad_v_strides, Sizes<5> sizes, int threads,
                               int64_t level_number) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const Level& level = level_at(level_number);
    const int64_t batch = sizes[0], queries = sizes[1], keys = sizes[2], heads = sizes[3], width = sizes[4];
    const Heads grad(grad_address, grad_strides), out(out_address, out_strides);
    const Heads q(q_address, q_strides), k(k_address, k_strides), v(v_address, v_strides);
    const WritableHeads grad_q(grad_q_address, grad_q_strides), grad_k(grad_k_address, grad_k_strides);
    const WritableHeads grad_v(grad_v_address, grad_v_strides);
    const auto* lse = pointer<const float>(lse_address);
    const Present present(View<const bool, 2>(key_present_address, key_present_strides), batch, keys);

    // The gradients of keys are sums over all queries of a head, which a single thread adds in order.
    const int64_t block = block_of(queries), tasks = batch * heads;
    const int size = team(threads, tasks, tasks * queries * keys * width);
    const Scratch scratch(size, level.backward_scratch(keys, width));
    const auto run = [&](int64_t task) {
        const int64_t b = task / heads, head = task % heads;
        level.backward({present.of(b, head, k, v, width),
                        {grad.at(b, 0, head, 0), grad.stride[1]},
                        {q.at(b, 0, head, 0), q.stride[1]},
                        {out.at(b, 0, head, 0), out.stride[1]},
                        lse + task * queries,
                        {grad_q.at(b, 0, head, 0), grad_q.stride[1]},
                        {grad_k.at(b, 0, head, 0), grad_k.stride[1]},
                        {grad_v.at(b, 0, head, 0), grad_v.stride[1]},
                        queries,
                        block},
                       scratch.mine());
    };
#pragma omp parallel for num_threads(size) schedule(dynamic) if (size > 1)
    for (int64_t task = 0; task < tasks; ++task) run(task);
}

static std::vector<std::string> attention_levels() {
    std::vector<std::string> names;
    for (const Level* level : levels()) names.push_back(level->name);
    return names;
}

void bind_attention(nb::module_& module) {
    module.def("attention_forward", &attention_forward, nb::arg("q"), nb::arg("q_strides"), nb::arg("k"),
               nb::arg("k_strides"), nb::arg("v"), nb::arg("v_strides"), nb::arg("key_present"),
               nb::arg("key_present_strides"), nb::arg("out"), nb::arg("lse"), nb::arg("sizes"), nb::arg("threads"),
               nb::arg("level") = 0);
    module.def("attention_backward", &attention_backward, nb::arg("grad"), nb::arg("grad_strides"), nb::arg("q"),
               nb::arg("q_strides"), nb::arg("k"), nb::arg("k_strides"), nb::arg("v"), nb::arg("v_strides"),
               nb::arg("key_present"), nb::arg("key_present_strides"), nb::arg("out"), nb::arg("out_strides"),
               nb::arg("lse"), nb::arg("grad_q"), nb::arg("grad_q_strides"), nb::arg("grad_k"),
               nb::arg("grad_k_strides"), nb::arg("grad_v"), nb::arg("grad_v_strides"), nb::arg("sizes"),
               nb::arg("threads"), nb::arg("level") = 0);
    module.def("attention_levels", &attention_levels);
}

}  // namespace mmmae

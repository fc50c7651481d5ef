// Attention and its gradients without the whole matrix of scores in memory; threads take heads and blocks of queries.
#include "cpu/arrays.h"
#include "head.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <omp.h>

#ifdef MMMAE_ATTENTION_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

namespace mmmae {
namespace {

using attention::Bfloat16;
using attention::Level;

// Multiply-adds for which another thread pays off.
constexpr int64_t PARALLEL_PRODUCTS = 1 << 18;
constexpr size_t ALIGNMENT = 64;

template <class T> using Heads = View<const T, 4>;  // [B, N, h, d]; the last stride, 1, is not read
template <class T> using WritableHeads = View<T, 4>;

#ifdef MMMAE_ATTENTION_LEVELS
bool has_avx2() { return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef MMMAE_ATTENTION_TILES
// Returns whether the CPU has tiles of bfloat16 and the system lets this process use them.
bool has_amx() {
    constexpr unsigned BFLOAT16_TILES = 1u << 22 | 1u << 24;  // CPUID 7, EDX
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & BFLOAT16_TILES) != BFLOAT16_TILES) return false;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

template <class T> std::vector<const Level<T>*> find_levels();

template <> std::vector<const Level<float>*> find_levels() {
    std::vector<const Level<float>*> found;
#ifdef MMMAE_ATTENTION_LEVELS
    if (has_avx512()) found.push_back(&attention::level_avx512);
    if (has_avx2()) found.push_back(&attention::level_avx2);
#endif
    found.push_back(&attention::level_plain);
    return found;
}

template <> std::vector<const Level<Bfloat16>*> find_levels() {
    std::vector<const Level<Bfloat16>*> found;
#ifdef MMMAE_ATTENTION_TILES
    // Dot products have half the speed of float32 on an Intel Xeon, as measured, and twice of it on AMD's CPUs, as said.
    const bool has_dot = has_avx512() && __builtin_cpu_supports("avx512bf16"), prefers_dot = __builtin_cpu_is("amd");
    if (has_dot && has_amx()) found.push_back(&attention::level_amx);
    if (has_dot && prefers_dot) found.push_back(&attention::level_dot);
#endif
#ifdef MMMAE_ATTENTION_LEVELS
    if (has_avx512()) found.push_back(&attention::level_avx512_widening);
#endif
#ifdef MMMAE_ATTENTION_TILES
    if (has_dot && !prefers_dot) found.push_back(&attention::level_dot);
#endif
#ifdef MMMAE_ATTENTION_LEVELS
    if (has_avx2()) found.push_back(&attention::level_avx2_widening);
#endif
    found.push_back(&attention::level_plain_widening);
    found.push_back(&attention::level_model);
    return found;
}

// The levels that this CPU supports, best first.
template <class T> const std::vector<const Level<T>*>& levels() {
    static const std::vector<const Level<T>*> found = find_levels<T>();
    return found;
}

template <class T> const Level<T>& level_at(int64_t number) {
    const int64_t count = static_cast<int64_t>(levels<T>().size());
    if (number < 0 || number >= count)
        fail("level is " + std::to_string(number) + ", expected 0.." + std::to_string(count - 1));
    return *levels<T>()[number];
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

    template <class T>
    attention::Keys<T> keys(int64_t b, int64_t head, const Heads<T>& k, const Heads<T>& v, int64_t width) const {
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
// queries and the level.
template <class T> int64_t block_of(int64_t queries, const Level<T>& level) {
    const int64_t blocks = std::max<int64_t>(1, (queries + level.max_queries - 1) / level.max_queries);
    const int64_t length = (queries + blocks - 1) / blocks;
    return std::max<int64_t>(1, (length + level.row_step - 1) / level.row_step) * level.row_step;
}

int team(int threads, int64_t tasks, int64_t products) {
    return static_cast<int>(std::max<int64_t>(1, std::min({int64_t{threads}, tasks, products / PARALLEL_PRODUCTS})));
}

template <class T>
void attention_forward(Address q_address, Sizes<4> q_strides, Address k_address, Sizes<4> k_strides, Address v_address,
                       Sizes<4> v_strides, Address key_present_address, Sizes<2> key_present_strides,
                       Address out_address, Address lse_address, Sizes<5> sizes, int threads, int64_t level_number) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const Level<T>& level = level_at<T>(level_number);
    const int64_t batch = sizes[0], queries = sizes[1], keys = sizes[2], heads = sizes[3], width = sizes[4];
    const Heads<T> q(q_address, q_strides), k(k_address, k_strides), v(v_address, v_strides);
    auto* out = pointer<T>(out_address);
    auto* lse = pointer<float>(lse_address);
    const Present present(View<const bool, 2>(key_present_address, key_present_strides), batch, keys);

    // A head is one task if there are enough heads for all threads, else its blocks of queries are divided into parts.
    const int64_t block = block_of(queries, level), blocks = (queries + block - 1) / block;
    const int64_t wanted = 4 * int64_t{threads};
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
        level.forward({present.keys(b, head, k, v, width),
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

template <class T>
void attention_backward(Address grad_address, Sizes<4> grad_strides, Address q_address, Sizes<4> q_strides,
                        Address k_address, Sizes<4> k_strides, Address v_address, Sizes<4> v_strides,
                        Address key_present_address, Sizes<2> key_present_strides, Address out_address,
                        Sizes<4> out_strides, Address lse_address, Address grad_q_address, Sizes<4> grad_q_strides,
                        Address grad_k_address, Sizes<4> grad_k_strides, Address grad_v_address,
                        Sizes<4> grad_v_strides, Sizes<5> sizes, int threads, int64_t level_number) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const Level<T>& level = level_at<T>(level_number);
    const int64_t batch = sizes[0], queries = sizes[1], keys = sizes[2], heads = sizes[3], width = sizes[4];
    const Heads<T> grad(grad_address, grad_strides), out(out_address, out_strides);
    const Heads<T> q(q_address, q_strides), k(k_address, k_strides), v(v_address, v_strides);
    const WritableHeads<T> grad_q(grad_q_address, grad_q_strides), grad_k(grad_k_address, grad_k_strides);
    const WritableHeads<T> grad_v(grad_v_address, grad_v_strides);
    const auto* lse = pointer<const float>(lse_address);
    const Present present(View<const bool, 2>(key_present_address, key_present_strides), batch, keys);

    // The gradients of keys are sums over all queries of a head, which a single thread adds in order.
    const int64_t block = block_of(queries, level), tasks = batch * heads;
    const int size = team(threads, tasks, tasks * queries * keys * width);
    const Scratch scratch(size, level.backward_scratch(keys, width));
    const auto run = [&](int64_t task) {
        const int64_t b = task / heads, head = task % heads;
        level.backward({present.keys(b, head, k, v, width),
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

template <class T> std::vector<std::string> attention_levels() {
    std::vector<std::string> names;
    for (const Level<T>* level : levels<T>()) names.push_back(level->name);
    return names;
}

template <class T> void bind(nb::module_& module, const std::string& suffix) {
    module.def(("attention_forward" + suffix).c_str(), &attention_forward<T>, nb::arg("q"), nb::arg("q_strides"),
               nb::arg("k"), nb::arg("k_strides"), nb::arg("v"), nb::arg("v_strides"), nb::arg("key_present"),
               nb::arg("key_present_strides"), nb::arg("out"), nb::arg("lse"), nb::arg("sizes"), nb::arg("threads"),
               nb::arg("level") = 0);
    module.def(("attention_backward" + suffix).c_str(), &attention_backward<T>, nb::arg("grad"),
               nb::arg("grad_strides"), nb::arg("q"), nb::arg("q_strides"), nb::arg("k"), nb::arg("k_strides"),
               nb::arg("v"), nb::arg("v_strides"), nb::arg("key_present"), nb::arg("key_present_strides"),
               nb::arg("out"), nb::arg("out_strides"), nb::arg("lse"), nb::arg("grad_q"), nb::arg("grad_q_strides"),
               nb::arg("grad_k"), nb::arg("grad_k_strides"), nb::arg("grad_v"), nb::arg("grad_v_strides"),
               nb::arg("sizes"), nb::arg("threads"), nb::arg("level") = 0);
    module.def(("attention_levels" + suffix).c_str(), &attention_levels<T>);
}

}  // namespace

void bind_attention(nb::module_& module) {
    bind<float>(module, "");
    bind<Bfloat16>(module, "_bfloat16");
}

}  // namespace mmmae

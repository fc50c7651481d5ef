// Random masks: Philox 4x32-10 noise and a bucket sort, one sample a task, with scratch memory for one sample a thread.
#include "cpu/arrays.h"

#include <nanobind/stl/array.h>

#include <omp.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace mmmae {
namespace {

constexpr uint32_t MASK_STREAM = 0;
// Drawing and sorting a number costs about as much as copying this many numbers.
constexpr int64_t SORT_COST = 2;

struct Words {
    uint32_t word[4];
};

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
Words philox_4x32_10(Words counter, uint32_t k0, uint32_t k1) {
    auto [c0, c1, c2, c3] = counter.word;
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

// Noise in the upper half, token number in the lower: keys are unique, and their order is that of a stable sort by
// noise.
using Keyed = uint64_t;

struct Row {
    int64_t *keep, *masked, *restore;  // [K], [M], [N]
};

// Noise is uniform, so sorting by its upper bits puts almost every key into a bucket of its own; insertion sort does
// the rest.
constexpr int MOST_BUCKET_BITS = 16;

int bucket_bits(int64_t tokens) {
    int bits = 1;
    while (bits < MOST_BUCKET_BITS && int64_t{1} << bits < tokens) ++bits;
    return bits;
}

// Scratch memory: `next` has one element for each bucket, `drawn` and `sorted` for each token.
void shuffle(uint64_t seed, uint64_t sample, int64_t tokens, int64_t kept, int bits, uint32_t* next, Keyed* drawn,
             Keyed* sorted, const Row& row) {
    const int shift = 64 - bits;
    std::fill_n(next, int64_t{1} << bits, 0);
    for (int64_t call = 0; 4 * call < tokens; ++call) {
        const Words counter{{static_cast<uint32_t>(call), MASK_STREAM, static_cast<uint32_t>(sample),
                             static_cast<uint32_t>(sample >> 32)}};
        const Words noise = philox_4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        for (int64_t n = 4 * call; n < std::min(4 * call + 4, tokens); ++n) {
            drawn[n] = Keyed{noise.word[n % 4]} << 32 | static_cast<uint64_t>(n);
            ++next[drawn[n] >> shift];
        }
    }
    uint32_t before = 0;
    for (int64_t bucket = 0; bucket < int64_t{1} << bits; ++bucket) before += std::exchange(next[bucket], before);
    for (int64_t n = 0; n < tokens; ++n) sorted[next[drawn[n] >> shift]++] = drawn[n];
    for (int64_t i = 1; i < tokens; ++i) {
        const Keyed key = sorted[i];
        int64_t place = i;
        for (; place > 0 && sorted[place - 1] > key; --place) sorted[place] = sorted[place - 1];
        sorted[place] = key;
    }
    for (int64_t place = 0; place < tokens; ++place) {
        const int64_t token = static_cast<uint32_t>(sorted[place]);
        row.restore[token] = place;
        (place < kept ? row.keep[place] : row.masked[place - kept]) = token;
    }
}

}  // namespace

static void random_masking(int64_t seed, int64_t first_sample, Address keep_address, Address masked_address,
                           Address restore_address, Sizes<3> sizes, int threads) {
    nb::gil_scoped_release release;
    check_threads(threads);
    const int64_t batch = sizes[0], tokens = sizes[1], kept = sizes[2];
    auto *keep = pointer<int64_t>(keep_address), *masked = pointer<int64_t>(masked_address);
    auto* restore = pointer<int64_t>(restore_address);
    if (tokens >= int64_t{1} << 32) fail("tokens is " + std::to_string(tokens) + ", expected less than 2^32");
    if (first_sample < 0 || first_sample > INT64_MAX - batch)
        fail("first_sample is " + std::to_string(first_sample) + ", expected sample numbers 0..2^63-1");
    const int team = static_cast<int>(std::max<int64_t>(std::min<int64_t>(threads, batch), 1));
    const int bits = bucket_bits(tokens);
    std::vector<Keyed> keys(2 * team * tokens);
    std::vector<uint32_t> counts(static_cast<size_t>(team) << bits);
#pragma omp parallel for num_threads(team) schedule(static) if (batch * tokens * SORT_COST >= PARALLEL_ELEMENTS)
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t thread = omp_get_thread_num();
        Keyed* drawn = keys.data() + 2 * tokens * thread;
        const Row row{keep + b * kept, masked + b * (tokens - kept), restore + b * tokens};
        shuffle(static_cast<uint64_t>(seed), static_cast<uint64_t>(first_sample + b), tokens, kept, bits,
                counts.data() + (thread << bits), drawn, drawn + tokens, row);
    }
}

void bind_random_masking(nb::module_& module) {
    module.def("random_masking", &random_masking, nb::arg("seed"), nb::arg("first_sample"), nb::arg("ids_keep"),
               nb::arg("ids_masked"), nb::arg("ids_restore"), nb::arg("sizes"), nb::arg("threads"));
}

}  // namespace mmmae

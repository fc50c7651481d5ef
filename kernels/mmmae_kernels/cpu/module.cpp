// The compiled CPU library: one Python module, to which each op's cpu.cpp adds its functions.
#include "cpu/arrays.h"

#include <omp.h>

namespace mmmae {

void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

void check_ids(const char* name, const Ids& ids, int64_t batch, int64_t keep, int64_t count) {
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t k = 0; k < keep; ++k) {
            const int64_t id = *ids.at(b, k);
            if (id < 0 || id >= count)
                fail(std::string(name) + "[" + std::to_string(b) + ", " + std::to_string(k) + "] is " +
                     std::to_string(id) + ", expected 0.." + std::to_string(count - 1));
        }
}

void check_threads(int threads) {
    if (threads < 1) fail("threads is " + std::to_string(threads) + ", expected at least 1");
}

static int team_size(int threads) {
    check_threads(threads);
    int size = 0;
#pragma omp parallel num_threads(threads)
#pragma omp single
    size = omp_get_num_threads();
    return size;
}

}  // namespace mmmae

NB_MODULE(_native, module) {
    module.doc() = "Native CPU kernels; mmmae_kernels.cpu.library loads them.";
    module.def("team_size", &mmmae::team_size, nanobind::arg("threads"),
               nanobind::call_guard<nanobind::gil_scoped_release>(),
               "Return how many threads OpenMP provides when asked for `threads`.");
    mmmae::bind_add_layer_norm(module);
    mmmae::bind_attention(module);
    mmmae::bind_decoder_tokens(module);
    mmmae::bind_gelu_linear(module);
    mmmae::bind_masked_loss(module);
    mmmae::bind_patch_embed(module);
    mmmae::bind_position(module);
    mmmae::bind_random_masking(module);
    mmmae::bind_rows(module);
}

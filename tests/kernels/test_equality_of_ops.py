"""Every backend of every op that serves here against its definition in float64, forward and every gradient."""

import pytest
import torch
from op_cases import CASES, check, far_cases

import mmmae_kernels
from mmmae_kernels import use_backend

BACKENDS = [name for name, answer in mmmae_kernels.explain("patch_embed").items() if answer == "serves"]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_within_1e_5_of_the_definition(case, backend):
    with use_backend(backend):
        check(case, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native"])  # which takes float32 alone
def test_half_precision_errs_at_most_twice_as_much_as_torch(case, dtype, backend):
    if backend == "triton" and not torch.cuda.is_available() and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly; needs a GPU, or the emulator: make verify-gpu")
    with use_backend(backend):
        check(case, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_2_to_the_31_are_reached(backend):
    """On memory of which only what is touched exists."""
    with use_backend(backend):
        for case in far_cases():
            check(case, torch.float32)

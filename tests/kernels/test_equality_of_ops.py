"""Every backend of every op that serves here against its definition in float64, forward and every gradient.

With TRITON_INTERPRET=1 the Triton kernels alone, in Triton's interpreter, which `make test` runs as a second process.
It multiplies bfloat16 wrongly, so that this type is left to test_emulated.py and to GPUs.
"""

import os

import pytest
import torch

import mmmae_kernels
from mmmae_kernels import masked_l2_loss, patch_l2_loss, random_masking, use_backend
from tests.cases.case import check
from tests.cases.ops import CASES, FAR

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") != "0"
SERVING = [name for name, answer in mmmae_kernels.explain("patch_embed").items() if answer == "serves"]
BACKENDS = ["triton"] if INTERPRETED else SERVING
HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_within_1e_5_of_the_definition(case, backend):
    with use_backend(backend):
        check(case, torch.float32)


@pytest.mark.parametrize("case", [case for case in CASES if case.small or not INTERPRETED], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native"])  # which takes float32 alone
def test_half_precision_errs_at_most_twice_as_much_as_torch(case, dtype, backend):
    with use_backend(backend):
        check(case, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_2_to_the_31_are_reached(backend):
    """On memory of which only what is touched exists."""
    with use_backend(backend):
        for case in FAR:
            check(case, torch.float32)


@pytest.mark.parametrize("tokens", [0, 1, 7, 63, 65, 783, 784, 4096, 4097])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_bitwise_those_of_the_definition(backend, tokens):
    for batch, keep, seed, first in (
        (2, tokens // 4, 5, 0),
        (1, 0, -1, 2**33 + 1),
        (1, tokens, 2**63 - 1, 7),
        (0, 0, 0, 0),
    ):
        arguments = {"batch": batch, "tokens": tokens, "keep": keep, "seed": seed, "first_sample": first}
        with use_backend("eager"):
            expected = random_masking(**arguments)
        with use_backend(backend):
            for ours, theirs in zip(random_masking(**arguments), expected, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native"])
@pytest.mark.parametrize("normalize", [False, True])
def test_small_gradients_of_a_scaled_loss_survive_float16(backend, normalize):
    """Of order 1e-7 before the loss is scaled up, where float16 has next to no digits."""
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(1, 4, 512, generator=generator).half()
    volume, weight = torch.randn(1, 1, 1, 32, 32, generator=generator).half(), torch.zeros(512, 1, 1, 16, 16).half()
    ids = torch.tensor([[0, 1, 2, 3]])
    for function in (
        lambda prediction: masked_l2_loss(prediction, torch.zeros_like(prediction), normalize=normalize),
        lambda prediction: patch_l2_loss(prediction, volume, weight, None, ids, normalize=normalize),
    ):
        grads = []
        for name in (backend, "eager"):
            prediction = noise.clone().requires_grad_()
            with use_backend(name):
                (65536.0 * function(prediction)).backward()
            grads.append(prediction.grad.double())
        assert grads[1].norm() > 0
        assert (grads[0] - grads[1]).norm() <= 1e-2 * grads[1].norm()

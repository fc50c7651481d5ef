"""Every backend of every op that serves here against its definition in float64, forward and every gradient.

With TRITON_INTERPRET=1 the Triton kernels alone, in Triton's interpreter, which `make test` runs as a second process.
It multiplies bfloat16 wrongly, so that this type is left to test_emulated.py and to GPUs.

In half and mixed types `eager` is not compared: it runs the definition, which would be compared with itself. tests/fuzz
compares it with expressions of its own.
"""

import os

import pytest
import torch

import mmmae_kernels
from mmmae_kernels import masked_l2_loss, patch_l2_loss, random_masking, use_backend
from tests.cases.case import TYPES, check
from tests.cases.ops import CASES, FAR

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") != "0"
SERVING = [name for name, answer in mmmae_kernels.explain("patch_embed").items() if answer == "serves"]
BACKENDS = ["triton"] if INTERPRETED else SERVING


def device_of(backend):
    """Return the device whose tensors a backend is tried with."""
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def pytest_generate_tests(metafunc):
    if "types" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-targets")
        calls = [
            pytest.param(backend, name, case, id=f"{backend}-{name}-{case}")
            for backend in BACKENDS
            for name in TYPES
            for case in CASES
            if backend != "eager" and name != "fp32" and (everything or runs_by_default(backend, name, case))
            # Native blocks run one by one, and have cases of their own.
            if (backend, case.op) != ("native", "stacked_blocks")
        ]
        none = pytest.param("", "", None, id="none", marks=pytest.mark.skip(reason="there is no backend with kernels"))
        metafunc.parametrize(("backend", "types", "case"), calls or [none])


def runs_by_default(backend, types, case):
    """Return whether a call in half or mixed types is compared without --all-targets."""
    if INTERPRETED:
        return types == "mixed fp16" and case.small
    return types == "mixed bf16" or (case.small if backend == "native" else types == "mixed fp16")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_within_1e_5_of_the_definition(case, backend):
    with use_backend(backend):
        check(case, torch.float32, device=device_of(backend))


def test_half_precision_errs_at_most_twice_as_much_as_torch(backend, types, case):
    with use_backend(backend):
        check(case, TYPES[types], device=device_of(backend))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if device_of(name) == "cpu"])
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
            found = random_masking(**arguments, device=device_of(backend))
            assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_small_gradients_of_a_scaled_loss_survive_float16(backend, normalize):
    """Of order 1e-7 before the loss is scaled up, where float16 has next to no digits."""
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(1, 4, 512, generator=generator).half()
    ids = torch.tensor([[0, 1, 2, 3]])

    def embedded_loss(prediction):
        volume, weight = prediction.new_ones(1, 1, 1, 32, 32), prediction.new_zeros(512, 1, 1, 16, 16)
        return patch_l2_loss(prediction, volume, weight, None, ids.to(prediction.device), normalize=normalize)

    for function in (
        lambda prediction: masked_l2_loss(prediction, torch.zeros_like(prediction), normalize=normalize),
        embedded_loss,
    ):
        grads = []
        for name, dtype in ((backend, torch.float16), ("eager", torch.float64)):
            prediction = noise.to(device_of(name), dtype, copy=True).requires_grad_()
            with use_backend(name):
                (65536.0 * function(prediction)).backward()
            grads.append(prediction.grad.double().cpu())
        assert grads[1].norm() > 0
        assert (grads[0] - grads[1]).norm() <= 1e-2 * grads[1].norm()

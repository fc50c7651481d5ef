"""The block's and the conditioning step's node in the types of autocast, on the Triton kernels that a GPU would run.

A stand-in computes attention as flash-attn does, and the other kernels are executed: by the emulator as compiled, or
with TRITON_INTERPRET=1 by Triton's interpreter. The native kernels in these types are in test_equality_of_ops.py.
"""

import contextlib
import copy
import os

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import mmmae
from mmmae_kernels import use_backend
from mmmae_kernels.transformer_block import conditioning, op
from tests.cases.case import TYPES, check
from tests.cases.conditioning import CASES as CONDITIONING
from tests.cases.transformer_block import CASES as BLOCKS
from tests.emulator.gpu import Emulator, emulated

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") != "0"


def pytest_generate_tests(metafunc):
    if "types" in metafunc.fixturenames:
        if INTERPRETED:
            names = ["mixed fp16"]
        elif metafunc.config.getoption("--all-targets"):
            names = [name for name in TYPES if name != "fp32"]
        else:
            names = ["mixed bf16"]
        metafunc.parametrize("types", names)


@pytest.mark.parametrize("case", [case for case in [*BLOCKS, *CONDITIONING] if case.small], ids=str)
def test_one_node_errs_at_most_twice_as_much_as_torch(monkeypatch, on_gpu, case, types):
    def refuse(*arguments):
        raise AssertionError("it runs sublayer by sublayer")

    for module in (op, conditioning):
        monkeypatch.setattr(module, "_by_sublayer", refuse)
    on_gpu("sm80", "flash_attn_2")
    with use_backend("triton") if INTERPRETED else emulated(Emulator("sm80")):
        check(case, TYPES[types])


def test_a_model_errs_at_most_twice_as_much_as_the_reference_under_autocast(on_gpu, pytestconfig):
    """Loss, prediction, latent and every gradient of the tiny model."""
    if INTERPRETED or not pytestconfig.getoption("--all-targets"):
        pytest.skip("executes compiled kernels for 15 seconds, run with --all-targets")
    torch.manual_seed(0)
    reference = mmmae.reference_model("tiny", image_size=64)
    hsi = torch.randn(2, 1, 12, 64, 64)
    aux = {name: torch.randn(2, 1, 64, 64) for name in reference.config.aux}
    present = {name: torch.tensor([True, False]) for name in aux}

    def run(model, hsi, aux, half=None):
        with torch.autocast("cpu", half) if half is not None else contextlib.nullcontext():
            output = model(hsi, aux, present, seed=3)
        grads = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
        named = {name: grad for (name, _), grad in zip(model.named_parameters(), grads, strict=True)}
        results = {"loss": output.loss, "prediction": output.prediction, "latent": output.latent, **named}
        return {name: value.detach().double() for name, value in results.items() if value is not None}

    double = copy.deepcopy(reference).double()
    truth = run(double, hsi.double(), {name: image.double() for name, image in aux.items()})
    theirs = run(reference, hsi, aux, torch.bfloat16)
    on_gpu("sm80", "flash_attn_2")
    with emulated(Emulator("sm80")):
        ours = run(mmmae.fast_model(reference, kernels="triton"), hsi, aux, torch.bfloat16)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, wanted in truth.items():
        assert (ours[name] - wanted).norm() <= 2 * (theirs[name] - wanted).norm() + 1e-7, name

"""Launches by plans: Triton's own launch path over a stub of the driver, and what a plan is found by.

That compiled kernels compute the right thing is test_emulated.py's; here it is that what the emulator gets is what
reaches a GPU's driver.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.emulator.stub_driver import lacking

pytest.importorskip("triton", reason="needs triton")
if lacking() is not None:
    pytest.skip(lacking(), allow_module_level=True)

from mmmae_kernels import random_masking, use_backend
from mmmae_kernels.gpu import launch as door
from mmmae_kernels.gpu import plans
from mmmae_kernels.gpu.compilation import kernel_source
from mmmae_kernels.gpu.executors import StandInGpu, execute_by
from mmmae_kernels.patch_embed.gpu import gather_patches
from tests.cases.case import TYPES, results
from tests.cases.ops import CASES, FAR

ROOT = Path(__file__).parents[2]

# Of the three models that are trained; the volume's gradient and noise in memory are not asked for by any of them.
KERNELS = {
    "_add_layer_norm_backward",
    "_add_layer_norm_forward",
    "_decoder_tokens_backward",
    "_decoder_tokens_forward",
    "_gather_patches",
    "_gelu_backward",
    "_gelu_forward",
    "_masked_l2_forward",
    "_merge_vectors",
    "_merge_vectors_backward",
    "_patch_embed_forward",
    "_patch_embed_weight_gradient",
    "_patch_l2_forward",
    "_random_masking",
    "_sum_partials",
    "_weighted_mean",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose driver torch has loaded already")
def test_what_reaches_the_driver_is_what_executors_are_told():
    check_launches("sm90")  # tests/soak/test_launch_path.py has other targets


def check_launches(target):
    """Run `tests.emulator.stub_driver.step` in a process of its own: Triton's driver is chosen once."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.emulator.stub_driver.step", target]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["first"]) == set(told["planned"]) == KERNELS
    assert sum(told["first"].values()) + sum(told["planned"].values()) == told["launches"]


class Known:
    """Starts no kernel; compares each launch with the first one that had the same key."""

    def __init__(self, target):
        self.target, self.launches, self.found = target, {}, 0

    def start(self, _, describe, tensors, numbers):
        described = door.describe_launch(self.target, describe, tensors, numbers)
        key, _ = door.key_and_pointers(describe, tensors, numbers)
        facts = facts_of(described, len(tensors), self.target)
        self.found += key in self.launches
        assert self.launches.setdefault(key, facts) == facts
        return described.configs[0]


def facts_of(described, tensors, target):
    """Return everything about a launch except its addresses; with types, because 1, True and 1.0 are equal."""
    names = described.kernel.arg_names
    first = [described.arguments[name] for name in names[:tensors]]
    assert all(value is None or isinstance(value, torch.Tensor) for value in first)
    numbers = {
        name: (type(described.arguments[name]), described.arguments[name])
        for name in names[tensors:]
        if name in described.arguments
    }
    facts = [described.kernel.fn.__name__, [value is None for value in first], numbers]
    for config in described.configs:
        source, _ = kernel_source(described.kernel, described.arguments, config, target)
        constants = {place: (type(value), value) for place, value in source.constants.items()}
        facts.append((described.grid(config.constants), config, source.signature, constants, source.attrs))
    return facts


@pytest.fixture(params=["sm90", "gfx942"])
def known(request, monkeypatch):
    """All launches of a test go to a `Known` of this architecture."""
    known = Known(request.param)
    monkeypatch.setattr(door, "start", known.start)
    monkeypatch.setattr(plans, "HIP", request.param.startswith("gfx"))
    with execute_by(StandInGpu(request.param)), use_backend("triton"):
        yield known


@pytest.fixture
def precisions():
    """Sets how float32 is multiplied, and back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def shifted(tensor):
    """Return the same numbers in memory that is off its alignment by one element."""
    moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    return moved.requires_grad_(tensor.requires_grad)


def as_it_is(tensor):
    return tensor


def run(case, types, change=as_it_is):
    """Run a case forward and backward, on inputs passed through `change`."""
    inputs = {name: None if t is None else change(t) for name, t in case.inputs(types).items()}
    results(case, case.call, inputs, types)


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_launches_of_one_key_are_one_launch(op, known, precisions):
    """Every case (for AMD the small ones) in all types and precisions, in memory that is aligned and that is not."""
    for case in [case for case in CASES if case.op == op and (case.small or not plans.HIP)]:
        for name in ("fp32", "fp16", "mixed bf16"):
            for precision in ("highest", "high") if name == "fp32" else ("highest",):
                precisions(precision)
                run(case, TYPES[name])
                run(case, TYPES[name])  # with other tensors
                run(case, TYPES[name], shifted)
    assert known.found > len(known.launches) / 4


def test_launches_far_apart_in_memory_have_keys_of_their_own(known):
    for case in FAR:
        run(case, TYPES["fp32"])


def test_masks_of_other_numbers_of_samples_have_keys_of_their_own(known):
    for first_sample in (0, 1, 2, 16, 2**33):
        for tokens, keep in ((784, 196), (1, 1), (4100, 5)):
            known_before = len(known.launches)
            random_masking(2, tokens, keep, seed=0, first_sample=first_sample)
            assert len(known.launches) == known_before + 1


# What a key may forget: each is broken here, to see that it is found.
def forget_types(describe, tensors, numbers):
    there = [None if tensor is None else tensor.data_ptr() % 16 == 0 for tensor in tensors]
    return (describe, numbers, *there), []


def forget_alignment(describe, tensors, numbers):
    return (describe, numbers, *[None if tensor is None else tensor.dtype for tensor in tensors]), []


def forget_numbers(describe, tensors, numbers):
    return plans.key_and_pointers(describe, tensors, ())


def run_in_two_types(change):
    for case in [case for case in CASES if case.op == "add_layer_norm"]:
        run(case, TYPES["fp32"], change)
        run(case, TYPES["fp16"], change)


@pytest.mark.parametrize("forget", [forget_types, forget_alignment, forget_numbers])
def test_a_key_that_forgets_something_is_found(forget, known, monkeypatch):
    run_in_two_types(as_it_is)
    run_in_two_types(shifted)
    known.launches.clear()
    monkeypatch.setattr(door, "key_and_pointers", forget)
    with pytest.raises(AssertionError):
        [run_in_two_types(change) for change in (as_it_is, shifted)]


@pytest.mark.parametrize("hip", [False, True])
def test_on_amd_a_key_tells_how_large_the_storage_is(hip, monkeypatch):
    """There Triton computes with 32 bits where these reach all of a tensor's storage."""
    known, ids = Known("gfx942"), torch.zeros(1, 1, dtype=torch.int64)
    monkeypatch.setattr(door, "start", known.start)
    monkeypatch.setattr(plans, "HIP", hip)
    small = torch.empty(2, 1, 1, 4, 4, dtype=torch.uint8)
    large = torch.empty(2**31 + 64, dtype=torch.uint8)[: small.numel()].view(small.shape)  # no page of it is touched
    with execute_by(StandInGpu("gfx942")):
        gather_patches(small, ids, (1, 2, 2))
        if hip:
            gather_patches(large, ids, (1, 2, 2))
            assert len(known.launches) == 2
        else:
            with pytest.raises(AssertionError):
                gather_patches(large, ids, (1, 2, 2))

"""The compiled Triton kernels on the emulator: every op against its definition, and every kernel broken on purpose.

By default on one architecture in bfloat16, mixed as under autocast, and one product on each of the two architectures
that multiply asynchronously; with --all-targets (make verify-gpu) on all architectures, in all types, and in single
types by every config of the launch tables.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: there is no compiled code to execute", allow_module_level=True)

import triton

import mmmae
import mmmae_kernels
from mmmae_kernels import random_masking, use_backend
from tests.cases.case import TYPES, check
from tests.cases.ops import CASES, FAR
from tests.emulator.gpu import BLACKWELL, HOPPER, MUTATIONS, Emulator, emulated
from tests.emulator.ptx import EmulatorError

SMALL = [case for case in CASES if case.small]
TARGETS = ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120"]
ASYNCHRONOUS = {"sm90": HOPPER, "sm100": BLACKWELL}  # those that multiply asynchronously, and how to break that
SEVERAL = ("patch_embed", "patch_l2_loss", "decoder_tokens")  # ops that choose among configs
PRODUCTS = ["_patch_embed_forward", "_patch_embed_weight_gradient", "_patch_embed_volume_gradient", "_patch_l2_forward"]


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--all-targets")
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", TARGETS if everything else ["sm80"])
    types = list(TYPES) if everything else ["mixed bf16"]
    if "choice" in metafunc.fixturenames:
        metafunc.parametrize(("case", "types", "choice"), [each for case in SMALL for each in executions(case, types)])
    elif "types" in metafunc.fixturenames:  # of offsets, which are the same in mixed fp16 as in mixed bf16
        metafunc.parametrize("types", [name for name in types if name != "mixed fp16"])
    if "broken_product" in metafunc.fixturenames:
        mutations = {target: {**MUTATIONS, **more} for target, more in ASYNCHRONOUS.items()}
        each = [(kernel, target, name) for kernel in PRODUCTS for target in ASYNCHRONOUS for name in mutations[target]]
        some = [pytest.param(("",), marks=pytest.mark.skip(reason="every product is broken with --all-targets"))]
        metafunc.parametrize("broken_product", each if everything else some, ids="-".join)


def executions(case, types):
    """Yield a case in all types, and in a single type by all configs: mixed types change none of what these differ in.

    All of a case run in one process, because what several targets and types have in common is executed once there.
    """
    for name in types:
        for choice in (0, 1, 2) if case.op in SEVERAL and not TYPES[name].autocast else (0,):
            group = pytest.mark.xdist_group(str(case))
            yield pytest.param(case, name, choice, id=f"{case}-{name}-{choice}", marks=group)


def test_compiled_kernels_compute_what_the_definition_says(case, target, types, choice):
    with emulated(Emulator(target, choice)) as emulator:
        check(case, TYPES[types])
    assert emulator.most_configs == 1 or case.op in SEVERAL


@pytest.mark.parametrize("asynchronous", ASYNCHRONOUS)
def test_asynchronous_products_are_right(asynchronous):
    with emulated(Emulator(asynchronous)):
        check(next(case for case in SMALL if str(case) == "patch_embed: 1x8x8, no bias, no position"), torch.bfloat16)


@pytest.mark.parametrize(("tokens", "keep"), [(784, 196), (63, 0), (7, 7), (1, 1), (4100, 5)])
def test_masks_are_bitwise_those_of_the_definition(target, tokens, keep):
    arguments = {"batch": 2, "tokens": tokens, "keep": keep, "seed": -5, "first_sample": 2**33}
    with use_backend("eager"):
        expected = random_masking(**arguments)
    with emulated(Emulator(target)):
        for ours, theirs in zip(random_masking(**arguments), expected, strict=True):
            assert torch.equal(ours, theirs)


# Of each kernel a case that starts it with rows, tokens and channels past the end of a block.
KERNELS = {
    "_random_masking": "random_masking",
    "_noise": "random_masking",
    "_patch_embed_forward": "patch_embed: 3x16x16, repeated tokens",
    "_patch_embed_weight_gradient": "patch_embed: 3x16x16, repeated tokens",
    "_patch_embed_volume_gradient": "patch_embed: 5x7x7, two channels, all tokens",
    "_gather_patches": "patchify: asked",
    "_patch_l2_forward": "patch_l2_loss: weighted, 5x7x7",
    "_masked_l2_forward": "masked_l2_loss: several warps",
    "_weighted_mean": "masked_l2_loss: by id, weighted",
    "_decoder_tokens_forward": "decoder_tokens: some visible",
    "_decoder_tokens_backward": "decoder_tokens: samples past a block",
    "_add_layer_norm_forward": "add_layer_norm: several warps",
    "_add_layer_norm_backward": "add_layer_norm: with residual and its bias",
    "_gelu_backward": "gelu_linear: past a block, with a bias of hidden",
    "_gelu_forward": "gelu_linear: past a block, with a bias of hidden",
    "_merge_vectors": "concat_attention: merge 3 into 5 x 35 of 80, presence from 0, gradients as they come",
    "_merge_vectors_backward": "concat_attention: merge 3 into 5 x 35 of 80, presence from 0, gradients as they come",
    "_sum_partials": "decoder_tokens: some visible",
}

# Kernels whose threads never wait for each other.
WITHOUT_BARRIERS = {
    "_decoder_tokens_forward",
    "_gather_patches",
    "_gelu_forward",
    "_noise",
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_broken_kernel_is_found(kernel, mutation):
    if mutation == "barrier" and kernel in WITHOUT_BARRIERS:
        assert "bar.sync" not in ptx_of(kernel)
        return
    with pytest.raises((EmulatorError, AssertionError)):
        run(kernel, Emulator("sm80", mutated=kernel, mutate=MUTATIONS[mutation]))


def test_a_broken_product_is_found(broken_product):
    kernel, target, mutation = broken_product
    mutate = {**MUTATIONS, **ASYNCHRONOUS[target]}[mutation]
    with pytest.raises((EmulatorError, AssertionError)):
        run(kernel, Emulator(target, mutated=kernel, mutate=mutate))


def run(kernel, emulator):
    """Check the case of a kernel on the emulator."""
    with emulated(emulator):
        if KERNELS[kernel] == "random_masking":
            tokens = 4098 if kernel == "_noise" else 783
            with use_backend("eager"):
                expected = random_masking(2, tokens, 7, seed=1)
            for ours, theirs in zip(random_masking(2, tokens, 7, seed=1), expected, strict=True):
                assert torch.equal(ours, theirs)
        else:
            check(next(case for case in SMALL if str(case) == KERNELS[kernel]), TYPES["mixed bf16"])


def ptx_of(kernel):
    """Return the PTX of a kernel, compiled for its case."""
    seen = []
    run(kernel, Emulator("sm80", mutated=kernel, mutate=lambda ptx: (seen.append(ptx), ptx + "// as it is")[1]))
    return seen[0]


def test_every_kernel_is_executed_and_broken():
    folder = Path(mmmae_kernels.__file__).parent
    for file in folder.glob("*/gpu.py"):
        importlib.import_module(f"mmmae_kernels.{file.parent.name}.gpu")
    kernels = {
        name
        for module in [sys.modules[name] for name in sys.modules if name.startswith("mmmae_kernels.")]
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and "tl.store(" in value.src
    }
    assert kernels - {"end_sums", "_is_last"} == set(KERNELS)  # these two are parts of kernels


def test_a_program_of_the_norm_takes_several_rows(monkeypatch):
    """As at large batches."""
    gpu = importlib.import_module("mmmae_kernels.add_layer_norm.gpu")
    monkeypatch.setattr(gpu, "PROGRAMS", 3)
    with emulated(Emulator("sm80")):
        for name in ("with residual", "odd width", "with residual and its bias"):
            check(next(case for case in SMALL if str(case) == f"add_layer_norm: {name}"), TYPES["mixed bf16"])


def test_offsets_beyond_2_to_the_31_are_reached(target, types):
    """Strides that no int32 holds, over memory of which only what is touched exists."""
    with emulated(Emulator(target)):
        for case in FAR:
            check(case, TYPES[types])


@pytest.mark.parametrize("overrides", [{}, {"target": "pixels", "normalize_target": True}], ids=["embedding", "pixels"])
def test_the_whole_model_trains_on_compiled_kernels(overrides):
    """Forward and backward of the tiny model, every kernel of ours executed as compiled for sm_80."""
    torch.manual_seed(0)
    reference = mmmae.reference_model("tiny", image_size=64, **overrides)
    hsi = torch.randn(1, 1, 12, 64, 64)
    aux = {name: torch.randn(1, 1, 64, 64) for name in reference.config.aux}
    expected = reference(hsi, aux, seed=3)
    wanted = torch.autograd.grad(expected.loss, list(reference.parameters()), allow_unused=True)
    model = mmmae.fast_model(reference, kernels="triton")
    with emulated(Emulator("sm80")):
        output = model(hsi, aux, seed=3)
        grads = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
    assert torch.equal(output.mask.ids_keep, expected.mask.ids_keep)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    for gradient, want in zip(grads, wanted, strict=True):
        assert (gradient is None) == (want is None)
        assert gradient is None or (gradient - want).norm() <= 1e-4 * want.norm() + 1e-7

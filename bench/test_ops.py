"""Times of each op on each backend against plain PyTorch, and the memory that one of them must not take."""

from __future__ import annotations

import pytest

from bench.limits import peak_bytes
from bench.op_cases import CASES, Place, patch_l2_loss_of_masked_tokens
from bench.options import Options
from mmmae_kernels import explain


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        options = Options.of(metafunc.config)
        pairs = [(op, variant) for op, (_, variants) in CASES.items() for variant in variants]
        if options.full:
            pairs += [(op, f"{variants[0]}, compiled") for op, (_, variants) in CASES.items()]
        metafunc.parametrize(("op", "variant"), [pair for pair in pairs if options.only in (None, pair[0])])


def test_time_of(timed, op, variant):
    timed(op, variant)


@pytest.mark.skipif(explain("patch_l2_loss")["native"] != "serves", reason="needs the native library")
def test_the_native_patch_loss_needs_six_tenths_of_the_memory():
    variants = patch_l2_loss_of_masked_tokens(8, Place()).variants
    for run in variants.values():
        run()
    assert peak_bytes(variants["native"]) <= 0.6 * peak_bytes(variants["embed, plain loss"])

"""Times of each op on each backend against plain PyTorch, and the memory that one of them must not take."""

from __future__ import annotations

import pytest

from bench.limits import peak_bytes
from bench.model_cases import HALF, multiplies_bfloat16
from bench.op_cases import CASES, patch_l2_loss_of_masked_tokens
from bench.op_work import Place
from bench.options import Options
from bench.results import Record
from bench.suite import Suite
from mmmae_kernels import explain

WITHOUT_TYPE = ("random_masking",)  # works on integers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        options = Options.of(metafunc.config)
        pairs = [(op, variant) for op, (_, variants) in CASES.items() for variant in variants]
        if options.full:
            pairs += [(op, f"{variants[0]}, compiled") for op, (_, variants) in CASES.items()]
        rows = [(*pair, options.dtype) for pair in pairs if options.only in (None, pair[0])]
        if options.dtype == "float32" and not options.quick and multiplies_bfloat16(options.device):
            rows += [(op, variant, HALF) for op, variant, _ in rows if op not in WITHOUT_TYPE]
        metafunc.parametrize(("op", "variant", "dtype"), rows)


def test_time_of(suite: Suite, record: Record, op: str, variant: str, dtype: str) -> None:
    """Time one variant of an op, round by round in turn with the others; forward and backward where it is trained.

    The variants are those of `bench.op_cases.CASES`: what one writes in plain PyTorch, and ours on each backend. The
    first is the baseline; a variant that differs from it in an output or a gradient is not timed. After the run's type
    comes bfloat16, where the device has instructions for it.
    """
    race = suite.op_race(op, dtype)
    if variant not in race.variants:
        pytest.skip(f"{variant} does not serve {op} in {dtype} here")
    complaint = race.complaint(variant)
    assert not complaint, f"{op}: {variant}: {complaint}"
    record(race.measurement(variant, suite.speeds_in(dtype)))


@pytest.mark.skipif(explain("patch_l2_loss")["native"] != "serves", reason="needs the native library")
def test_the_native_patch_loss_needs_six_tenths_of_the_memory() -> None:
    variants = patch_l2_loss_of_masked_tokens(8, Place()).variants
    for run in variants.values():
        run()
    assert peak_bytes(variants["native"]) <= 0.6 * peak_bytes(variants["embed, plain loss"])

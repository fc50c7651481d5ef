"""Compiled random masks: bit for bit those of the reference, which is plain torch."""

from __future__ import annotations

import pytest
import torch

from mmmae_kernels.random_masking.cpu import random_masking_forward
from mmmae_kernels.random_masking.reference import random_masking_reference

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("library", "poisoned")


def both(batch: int, tokens: int, keep: int, seed: int = 0, first_sample: int = 0) -> list[list[torch.Tensor]]:
    arguments = (batch, tokens, keep, torch.tensor(seed), CPU, first_sample)
    return [list(random_masking_forward(*arguments)), list(random_masking_reference(*arguments))]


def assert_equal(ours, theirs) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 7, 63, 65, 255, 256, 257, 783, 784, 5000])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_masks_are_those_of_the_reference(batch, tokens):
    for keep in {0, tokens // 4, tokens}:
        assert_equal(*both(batch, tokens, keep, seed=tokens))


@pytest.mark.parametrize("seed", [1, -1, 2**31, 2**32, 2**62 + 5, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("first_sample", [0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 10])
def test_masks_are_those_of_the_reference_for_any_seed_and_sample(seed, first_sample):
    assert_equal(*both(3, 50, 12, seed, first_sample))


def test_tokens_of_equal_noise_stay_in_order():
    """Among 3 * 10^5 numbers of 32 bits about ten pairs are equal."""
    assert_equal(*both(1, 300_000, 1000, seed=3))


@pytest.mark.parametrize(("batch", "tokens"), [(41, 784), (3, 65)])
def test_masks_are_the_same_for_any_number_of_threads_and_every_time(on_threads, batch, tokens):
    expected = both(batch, tokens, 16)[0]
    for threads in (1, 2, 3, 64, *[2] * 100):
        on_threads(threads)
        assert_equal(random_masking_forward(batch, tokens, 16, torch.tensor(0), CPU, 0), expected)


def test_nothing_outside_the_tables_is_written(library, guarded):
    for threads in (1, 2):
        tables = [guarded(30, size, dtype=torch.int64) for size in (100, 684, 784)]
        library.random_masking(0, 0, *tables, threads)
        assert_equal(tables, both(30, 784, 100)[1])


WRONG = [
    ({"ids_keep": torch.zeros(2, 3)}, r"^ids_keep: dtype is float32, expected is int64"),
    ({"ids_keep": torch.zeros(2, 9, dtype=torch.int64)}, r"^ids_masked: shape is \[2, 5\], expected is \[2, -1\]"),
    ({"ids_masked": torch.zeros(2, 4, dtype=torch.int64)}, r"^ids_masked: shape is \[2, 4\], expected is \[2, 5\]"),
    ({"ids_masked": torch.zeros(5, 2, dtype=torch.int64).t()}, r"^ids_masked: strides are"),
    ({"ids_restore": torch.zeros(8, dtype=torch.int64)}, r"^ids_restore: shape is \[8\], expected is \[B, N\]"),
    ({"ids_restore": torch.zeros(1, 1, dtype=torch.int64).expand(2, 2**32)}, r"^ids_keep|^ids_masked|^ids_restore"),
    ({"first_sample": -1}, r"^first_sample: -1 given"),
    ({"first_sample": 2**63 - 2}, r"^first_sample: 9223372036854775806 given"),
    ({"threads": 0}, r"^threads: 0 given, expected is at least 1"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_arguments_are_refused_and_nothing_is_written(library, wrong, message):
    tables = {
        name: torch.full((3, size), -1) for name, size in (("ids_keep", 3), ("ids_masked", 5), ("ids_restore", 8))
    }
    tables = {name: table[:2] for name, table in tables.items()}
    with pytest.raises(ValueError, match=message):
        library.random_masking(**{"seed": 0, "first_sample": 0, "threads": 2, **tables, **wrong})
    for name, table in tables.items():
        assert name in wrong or torch.equal(table, torch.full_like(table, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 8, 9, torch.tensor(0), CPU, 0), "keep"),
        ((2, 8, -1, torch.tensor(0), CPU, 0), "keep"),
        ((-1, 8, 3, torch.tensor(0), CPU, 0), "batch"),
        ((2, 8, 3, torch.tensor(0.0), CPU, 0), "seed"),
        ((2, 8, 3, torch.tensor([0]), CPU, 0), "seed"),
        ((2, 8, 3, torch.tensor(0), torch.device("meta"), 0), "device"),
        ((2, 8, 3, torch.tensor(0), CPU, -1), "first_sample"),
    ],
)
def test_the_function_refuses_what_it_can_not_draw(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_masking_forward(*arguments)

"""Compiled random masks: bit for bit those of the reference, which is plain torch."""

from __future__ import annotations

import pytest
import torch

from mmmae_kernels import random_masking, use_backend
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


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_outside_the_tables_is_written(on_threads, guarded_allocations, threads):
    on_threads(threads)
    tables = random_masking_forward(30, 784, 100, torch.tensor(0), CPU, 0)
    assert len(guarded_allocations) == 3
    assert_equal(tables, both(30, 784, 100)[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": (1, 2**32, 0)}, "^tokens is 4294967296, expected"),
        ({"first_sample": -1}, "^first_sample is -1, expected"),
        ({"first_sample": 2**63 - 2}, "^first_sample is 9223372036854775806, expected"),
        ({"threads": 0}, "^threads is 0, expected"),
    ],
)
def test_wrong_numbers_are_refused_and_nothing_is_written(library, guarded, wrong, message):
    tables = [guarded(2, size, dtype=torch.int64) for size in (3, 5, 8)]
    keep, masked, restore = (table.data_ptr() for table in tables)
    numbers = {"seed": 0, "first_sample": 0, "sizes": (2, 8, 3), "threads": 2, **wrong}
    with pytest.raises(ValueError, match=message):
        library.random_masking(ids_keep=keep, ids_masked=masked, ids_restore=restore, **numbers)
    assert all(bool((table == -1).all()) for table in tables)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 9}, "keep"),
        ({"keep": -1}, "keep"),
        ({"batch": -1}, "batch"),
        ({"seed": torch.tensor(0.0)}, "seed"),
        ({"seed": torch.tensor([0])}, "seed"),
        ({"device": "meta"}, "meta"),
        ({"first_sample": -1}, "first_sample"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with use_backend("native"), pytest.raises(ValueError, match=message):
        random_masking(**{"batch": 2, "tokens": 8, "keep": 3, "seed": 0, **wrong})

"""Random masks: Philox as published, tables that fit together, and a function of (seed, sample, token) alone."""

import numpy
import pytest
import torch

from mmmae_kernels import random_masking
from mmmae_kernels.random_masking import op
from mmmae_kernels.random_masking.reference import philox_4x32_10, philox_noise

# Known answers of the Random123 library's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox_4x32_10(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize(
    ("batch", "tokens", "keep"), [(3, 784, 196), (2, 1, 1), (1, 7, 3), (4, 65, 64), (2, 5, 5), (2, 5, 0), (0, 9, 4)]
)
def test_the_tables_fit_together(batch, tokens, keep):
    mask = random_masking(batch, tokens, keep, seed=3)
    assert mask.ids_keep.shape == (batch, keep)
    assert mask.ids_masked.shape == (batch, tokens - keep)
    order = torch.cat([mask.ids_keep, mask.ids_masked], dim=1)
    numbers = torch.arange(tokens).expand(batch, tokens)
    assert torch.equal(order.sort(dim=1).values, numbers)
    assert torch.equal(order.gather(1, mask.ids_restore), numbers)


def test_a_sample_has_the_same_mask_in_any_batch_and_on_any_rank():
    whole = random_masking(8, 784, 196, seed=5)
    for first, size in ((0, 3), (3, 5), (7, 1)):
        part = random_masking(size, 784, 196, seed=5, first_sample=first)
        for table, expected in zip(part, whole, strict=True):
            assert torch.equal(table, expected[first : first + size])


def test_a_mask_is_the_same_tomorrow():
    mask = random_masking(2, 16, 4, seed=42)
    assert mask.ids_keep.tolist() == [[2, 5, 3, 15], [0, 15, 6, 12]]


def test_seeds_and_samples_draw_different_masks():
    masks = [random_masking(2, 784, 196, seed=seed).ids_keep for seed in (0, 1, 2**32, 2**63, -1)]
    rows = torch.cat(masks).tolist()
    assert len({tuple(row) for row in rows}) == len(rows) == 10


def test_the_ends_of_the_seed_range_are_one_key():
    assert torch.equal(random_masking(1, 64, 9, seed=-1).ids_keep, random_masking(1, 64, 9, seed=2**64 - 1).ids_keep)


def test_a_seed_may_be_a_tensor():
    assert torch.equal(
        random_masking(1, 64, 9, seed=torch.tensor(7)).ids_keep, random_masking(1, 64, 9, seed=7).ids_keep
    )


@pytest.mark.parametrize("number", [numpy.int64, numpy.int32, numpy.uint8], ids=lambda kind: kind.__name__)
def test_integers_of_numpy_are_whole_numbers(number):
    given = random_masking(number(2), number(16), number(5), number(7), first_sample=number(3))
    for ours, expected in zip(given, random_masking(2, 16, 5, 7, first_sample=3), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16], ids=str)
def test_a_seed_may_be_a_tensor_of_any_integer_type(dtype):
    mask = random_masking(1, 64, 9, seed=torch.tensor(7, dtype=dtype))
    assert torch.equal(mask.ids_keep, random_masking(1, 64, 9, seed=7).ids_keep)


def test_every_token_is_kept_equally_often():
    # 4000 samples keep each token 1000 times, give or take sqrt(4000 * 1/4 * 3/4) = 27; five deviations are 137.
    kept = random_masking(4000, 16, 4, seed=1).ids_keep.flatten().bincount(minlength=16)
    assert (kept - 1000).abs().max() < 137


def test_noise_beyond_32_bits_of_sample_number_differs():
    low, high = philox_noise(torch.tensor(0), torch.tensor([5, 5 + 2**32]), 8, 0)
    assert not torch.equal(low, high)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": -1}, "batch is -1"),
        ({"batch": 2.0}, r"batch is 2\.0, expected a whole number 0\.\.9223372036854775807"),
        ({"batch": True}, "batch is True, expected a whole number"),
        ({"batch": 2**63}, r"batch is 9223372036854775808, expected a whole number 0\.\.9223372036854775807"),
        ({"batch": 2**59}, r"batch is 576460752303423488, expected less than 2\^60 tokens in total \(16 a sample\)"),
        ({"batch": torch.tensor(1.0)}, r"batch is a torch\.float32 Tensor of shape \[\], expected a whole number"),
        ({"tokens": 2**32}, r"tokens is 4294967296, expected a whole number 0\.\.4294967295"),
        ({"keep": 17}, r"keep is 17, expected a whole number 0\.\.16"),
        ({"keep": -1}, "keep is -1"),
        ({"keep": 2.5}, r"keep is 2\.5, expected a whole number 0\.\.16"),
        ({"keep": numpy.float32(2.9)}, r"keep is (np\.float32\()?2\.9\)?, expected a whole number 0\.\.16"),
        ({"keep": "4"}, r"keep is '4', expected a whole number"),
        ({"seed": 2**64}, r"seed is 18446744073709551616, expected a whole number -9223372036854775808\.\.1844"),
        ({"seed": True}, "seed is True, expected a whole number"),
        ({"seed": torch.tensor(1.0)}, r"seed is a torch\.float32 Tensor of shape \[\], expected a scalar"),
        ({"seed": torch.tensor([1])}, r"seed is a torch\.int64 Tensor of shape \[1\], expected a scalar"),
        ({"first_sample": -1}, "first_sample is -1"),
        ({"first_sample": 2**63 - 1}, r"first_sample is 9223372036854775807, expected a whole number 0\.\.92"),
        ({"device": "gpu"}, "device is 'gpu', expected one that torch can use: "),
        ({"device": 1.5}, r"device is 1\.5, expected a torch\.device or a name"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_masking(**{"batch": 1, "tokens": 16, "keep": 4, "seed": 0, **arguments})


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda"), "cuda:1"])
def test_each_gpu_has_a_choice_of_its_own(monkeypatch, device):
    keys = []

    def select(key, *arguments):
        keys.append((key, arguments[4]))
        return lambda *arguments: (torch.empty(0),) * 3

    monkeypatch.setattr(op, "_usable", {device})
    monkeypatch.setattr(op.RANDOM_MASKING, "select", select)
    for index in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        random_masking(1, 4, 2, 0, device=device)
    expected = [torch.device("cuda", index) for index in ((1, 1) if device == "cuda:1" else (0, 1))]
    assert keys == [(device, device) for device in expected]

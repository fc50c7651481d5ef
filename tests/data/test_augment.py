"""Crops and flips are at the same place of the scene for every image of a subject."""

import numpy as np
import pytest
import torch

from mmmae.data import Sample, augment
from mmmae.phantom import Phantom


def ramps(size, aux_size, aux_name="ir"):
    """Return a subject whose images hold each pixel's row and column in two bands, as shares of the image's size."""

    def ramp(height, width):
        y = (torch.arange(height) + 0.5) / height
        x = (torch.arange(width) + 0.5) / width
        return torch.stack([y[:, None].expand(height, width), x.expand(height, width)])

    valid = torch.ones(size, dtype=torch.bool)
    return Sample("s", ramp(*size)[None], {aux_name: ramp(*aux_size)}, valid)


def numbers(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("sizes", [((32, 32), (16, 16)), ((32, 32), (64, 64)), ((24, 36), (16, 24))])
def test_every_image_shows_the_same_place(sizes):
    sample = ramps(*sizes)
    for seed in range(20):
        made = augment(sample, numbers(seed), crop=(0.3, 0.6))
        assert made.hsi.shape == sample.hsi.shape
        assert made.aux["ir"].shape == sample.aux["ir"].shape
        # A linear ramp is resampled exactly, but for the border of half a pixel beyond the last centre; each image's
        # mean over the crop is then the crop's centre.
        centre = made.hsi[0].mean((1, 2))
        margin = 0.5 / min(*sizes[0], *sizes[1])
        torch.testing.assert_close(made.aux["ir"].mean((1, 2)), centre, rtol=0, atol=margin)
        corner = made.hsi[0, :, 0, 0] - made.aux["ir"][:, 0, 0]
        assert corner.abs().max() <= 0.5 * (1 / min(sizes[0]) + 1 / min(sizes[1]))  # half a pixel of each


def test_a_crop_has_the_asked_share_of_the_area():
    sample = ramps((64, 64), (64, 64))
    for seed in range(20):
        hsi = augment(sample, numbers(seed), crop=(0.3, 0.5), flip=False).hsi[0]
        # From the first to the last pixel centre there are 63/64 of the crop's side; a border pixel hides half of one.
        side = (hsi[:, -1, -1] - hsi[:, 0, 0]) * 64 / 63
        assert torch.all(side >= 0.3**0.5 - 1 / 64)
        assert torch.all(side <= 0.5**0.5 + 1 / 64)


def test_a_crop_is_anywhere_within_the_image():
    sample = ramps((64, 64), (64, 64))
    for seed in range(20):
        _, top, left = numbers(seed).random(3).tolist()
        made = augment(sample, numbers(seed), crop=(0.25, 0.25), flip=False)
        # The mean of a ramp over a crop of half a side is its centre; a border pixel moves it by less than 1/64.
        centre = torch.tensor([top, left]) * 0.5 + 0.25
        torch.testing.assert_close(made.hsi[0].mean((1, 2)), centre, rtol=0, atol=1 / 64)


def test_a_pixel_is_valid_where_half_of_it_is():
    sample = ramps((32, 32), (32, 32))
    sample.valid[:, 16:] = False  # the images hold each pixel's column as a share: beyond 0.5 nothing is valid
    for seed in range(20):
        made = augment(sample, numbers(seed), crop=(0.3, 0.9), flip=False)
        column = made.aux["ir"][1]
        clear = (column - 0.5).abs() > 1e-5
        assert torch.equal(made.valid[clear], (column < 0.5)[clear])


def test_flips_are_all_eight_and_the_same_for_every_image():
    sample = ramps((8, 8), (4, 4))
    seen = set()
    for seed in range(100):
        made = augment(sample, numbers(seed), crop=None)
        torch.testing.assert_close(torch.nn.functional.avg_pool2d(made.hsi[0], 2), made.aux["ir"])
        assert torch.equal(made.hsi.sort(-1).values.sort(-2).values.sum(), sample.hsi.sum())
        seen.add(tuple(made.hsi[0, :, 0, 0].tolist() + made.hsi[0, :, 0, -1].tolist()))
    assert len(seen) == 8


def test_an_image_that_is_not_square_is_not_transposed():
    sample = ramps((8, 8), (4, 6))
    for seed in range(20):
        made = augment(sample, numbers(seed), crop=None)
        assert made.aux["ir"].shape == (2, 4, 6)
        assert made.hsi[0, 0].std(1).max() == 0  # rows are still rows


def test_the_generator_alone_decides_and_the_sample_stays():
    sample = Phantom(length=1, image_size=32, missing=0.0)[0]
    before = sample.hsi.clone()
    first, second = augment(sample, numbers(3)), augment(sample, numbers(3))
    assert torch.equal(first.hsi, second.hsi)
    assert all(torch.equal(first.aux[name], second.aux[name]) for name in sample.aux)
    assert not torch.equal(first.hsi, augment(sample, numbers(4)).hsi)
    assert torch.equal(sample.hsi, before)
    one, other = numbers(0), numbers(0)
    augment(sample, one, crop=None, flip=False)
    augment(sample, other)
    assert one.random() == other.random()


def test_nothing_changes_with_nothing_to_do():
    sample = Phantom(length=1, image_size=32, missing=0.0)[0]
    for crop in (None, (1.0, 1.0)):
        made = augment(sample, numbers(0), crop=crop, flip=False)
        assert torch.equal(made.hsi, sample.hsi)
        assert torch.equal(made.valid, sample.valid)


def test_invalid_pixels_stay_invalid_and_zero():
    sample = Phantom(length=1, image_size=48, missing=0.0)[0]
    for seed in range(10):
        made = augment(sample, numbers(seed))
        assert made.valid.dtype == torch.bool
        assert made.hsi[0, :, ~made.valid].abs().sum() == 0
        assert made.hsi[0, :, made.valid].abs().sum(0).min() > 0


@pytest.mark.parametrize("crop", [(0.0, 1.0), (0.6, 0.5), (0.5, 1.1)])
def test_shares_out_of_order_are_refused(crop):
    with pytest.raises(ValueError, match="expected two shares"):
        augment(Phantom(length=1, image_size=16)[0], numbers(0), crop=crop)

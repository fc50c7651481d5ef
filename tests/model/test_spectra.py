"""Spectra are standardised by measured statistics, and means over squares are those of their definition."""

import pytest
import torch

import mmmae
from mmmae.model.heads import SegmentationModel
from mmmae.model.spectra import FLOOR, SIDES, MeansLinear, Spectra


def test_spectra_have_two_forms_and_the_second_ignores_gain_and_offset():
    bands = torch.randn(2, 5, 3, 4)
    spectra = Spectra(5)
    forms = spectra(bands)  # before any statistics are measured
    assert forms.shape == (2, spectra.channels, 3, 4)
    assert torch.equal(forms[:, :5], bands)
    torch.testing.assert_close(
        forms[:, 5:], (bands - bands.mean(1, True)) / bands.std(1, correction=0, keepdim=True), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(spectra(2 * bands + 7)[:, 5:], forms[:, 5:], rtol=1e-3, atol=1e-3)
    assert spectra(torch.ones(1, 5, 2, 2))[:, 5:].abs().max() == 0


def test_fitted_spectra_have_mean_0_and_each_direction_the_variance_that_the_floor_leaves():
    spectra = Spectra(6)
    mixed = torch.randn(6, 6) @ torch.diag(torch.tensor([3.0, 1, 0.3, 0.1, 0.03, 0.01]))
    images = [5 + torch.einsum("tu,buhw->bthw", mixed, torch.randn(3, 6, 20, 30)) for _ in range(2)]
    forms = torch.cat([spectra.forms(image).movedim(1, -1).flatten(0, 2) for image in images]).double()
    variances = torch.linalg.eigvalsh(torch.cov(forms.T, correction=0)).clamp(min=0)
    spectra.fit(images)
    found = torch.cat([spectra(image).movedim(1, -1).flatten(0, 2) for image in images]).double()
    assert found.mean(0).abs().max() < 1e-3
    expected = variances / (variances + FLOOR * variances.mean())
    torch.testing.assert_close(
        torch.linalg.eigvalsh(torch.cov(found.T, correction=0)), expected.sort().values, rtol=0.01, atol=1e-3
    )
    assert expected.max() > 0.99
    assert expected.min() < 0.01


def test_pixels_without_data_do_not_count():
    bands = torch.randn(1, 4, 8, 8)
    clean, holed = Spectra(4), Spectra(4)
    clean.fit([bands])
    rims = torch.zeros(1, 4, 8, 3)
    holed.fit([torch.cat([rims, bands, torch.full((1, 4, 8, 1), torch.nan)], dim=3)])
    assert torch.equal(holed.mean, clean.mean)
    torch.testing.assert_close(holed.whitening, clean.whitening)


@pytest.mark.parametrize("images", [[], [torch.zeros(1, 4, 5, 5)], [torch.ones(1, 4, 5, 5)]], ids=["none", "0", "1"])
def test_without_variance_spectra_stay_as_they_are(images):
    spectra = Spectra(4)
    spectra.fit(images)
    assert torch.equal(spectra.whitening, torch.eye(8))


@pytest.mark.parametrize(
    ("size", "sides"), [((1, 1), SIDES), ((2, 5), SIDES), ((9, 13), SIDES), ((4, 6), (1,)), ((4, 6), (5, 3))], ids=str
)
def test_a_linear_map_of_means_is_that_of_the_joined_means(size, sides):
    height, width = size
    linear, image = MeansLinear(5, 3, sides).double(), torch.randn(2, 5, *size, dtype=torch.float64)
    joined = torch.zeros(2, len(sides), 5, *size, dtype=torch.float64)
    for number, side in enumerate(sides):
        for row in range(height):
            for column in range(width):
                rows, columns = (slice(max(0, place - side // 2), place + side // 2 + 1) for place in (row, column))
                square = image[:, :, rows, columns]
                joined[:, number, :, row, column] = side * square.mean((2, 3))
    weight = linear.weight.view(len(sides), 3, 5)
    expected = torch.einsum("sot,bsthw->bohw", weight, joined) + (
        linear.bias.view(len(sides), 3) * torch.tensor(sides)[:, None]
    ).sum(0).view(3, 1, 1)
    torch.testing.assert_close(linear(image), expected)


def test_a_model_fits_the_spectra_of_the_size_that_its_head_sees():
    config = mmmae.MMMAEConfig.preset("tiny", image_size=16, patch=(3, 8, 8), aux={})
    model = SegmentationModel(mmmae.HSIEncoder(config), 3)
    alone = Spectra(12)
    hsi = torch.randn(2, 1, 12, 16, 16)
    alone.fit([hsi[:, 0]])
    model.fit_spectra([hsi[:1], hsi[1:]])
    torch.testing.assert_close(model.head.spectra.whitening, alone.whitening)
    assert {"head.spectra.mean", "head.spectra.whitening"} <= set(model.state_dict())

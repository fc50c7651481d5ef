"""Bands are selected by number or by wavelength; an error says which bands exist."""

import numpy as np
import pytest
import torch

from mmmae.data import select_bands
from mmmae.data.readers.cube import Cube

NM = np.array([450.0, 500.0, 550.0, 600.0, 650.0])


def make_cube(values, wavelengths=NM):
    tensor = torch.from_numpy(values)
    nm = None if wavelengths is None else torch.tensor(wavelengths, dtype=torch.float32)
    return Cube(tensor, nm, torch.zeros_like(tensor, dtype=torch.bool))


def test_bands_are_selected_in_the_order_asked_for(values):
    cube = select_bands(make_cube(values), bands=[3, 0])
    np.testing.assert_array_equal(cube.values.numpy(), values[[3, 0]])
    assert cube.wavelengths.tolist() == [600, 450]
    assert cube.nodata.shape == (2, 6, 7)


def test_wavelengths_select_the_nearest_band_within_the_tolerance(values):
    cube = select_bands(make_cube(values), wavelengths=[604, 460], tolerance=10)
    assert cube.wavelengths.tolist() == [600, 450]
    np.testing.assert_array_equal(cube.values.numpy(), values[[3, 0]])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bands": [0, 5]}, r"no band 5: the file has bands 0 to 4"),
        ({"bands": [-1]}, r"no band -1"),
        ({"bands": []}, r"no band is selected"),
        ({"wavelengths": []}, r"no band is selected"),
        ({"wavelengths": [475.0]}, r"within 10 nm of 475 nm: the file has 5 bands from 450 to 650 nm, the nearest is"),
        ({"wavelengths": [599.0, 601.0]}, r"599 and 601 nm share the nearest band, 600 nm"),
        ({}, r"either bands= or wavelengths="),
        ({"bands": [0], "wavelengths": [450.0]}, r"either bands= or wavelengths="),
    ],
)
def test_a_selection_that_cannot_be_met_says_why(values, asked, message):
    with pytest.raises(ValueError, match=message):
        select_bands(make_cube(values), **asked)


def test_a_cube_without_wavelengths_is_not_selected_by_wavelength(values):
    with pytest.raises(ValueError, match="the file has no wavelengths; select bands by number"):
        select_bands(make_cube(values, None), wavelengths=[450.0])

"""Bands are selected by number or by wavelength; an error says which bands exist."""

import numpy as np
import pytest
import torch

from mmmae.data import PairedFolder, select_bands
from mmmae.data.bands import BandChoice, described_choice
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


@pytest.mark.parametrize(
    ("text", "bands", "intervals", "total"),
    [
        ("3,7", [3, 7], None, None),
        ("0-3", [0, 1, 2, 3], None, None),
        ("0-2, 5 ,7-8", [0, 1, 2, 5, 7, 8], None, None),
        ("0,2-3 of 9", [0, 2, 3], None, 9),
        ("400-1340,1460-1790nm", None, [(400, 1340), (1460, 1790)], None),
        ("400.5-500 nm,600nm-700NM", None, None, None),
        ("400-500.5 nm,600-700NM", None, [(400, 500.5), (600, 700)], None),
    ],
)
def test_bands_are_numbers_ranges_or_intervals(text, bands, intervals, total):
    if bands is None and intervals is None:
        with pytest.raises(ValueError, match="expected numbers and ranges of bands"):
            BandChoice.parse(text)
        return
    choice = BandChoice.parse(text)
    assert (choice.bands, choice.intervals, choice.total) == (bands, intervals, total)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected numbers and ranges of bands like 0-189,213, or intervals in nm like 400-1340,1460-1790nm"),
        ("a", "bands is 'a', expected"),
        ("0-", "expected numbers and ranges"),
        ("-1", "expected numbers and ranges"),
        ("5-2", "expected numbers and ranges"),
        ("1.5", "expected numbers and ranges"),
        ("500-600nm of 9", "expected numbers and ranges"),
        ("550nm", "550 nm is no interval; wavelengths= takes the nearest band"),
        ("0-999999999999", "expected numbers below 65536"),
        ("0-3,2", "bands has 2 twice"),
    ],
)
def test_other_texts_are_no_bands(text, message):
    with pytest.raises(ValueError, match=message):
        BandChoice.parse(text)


def test_all_bands_in_intervals_are_chosen_with_their_ends():
    choice = BandChoice.parse("450-550,600-650nm").resolved(5, torch.from_numpy(NM))
    assert choice.bands == [0, 1, 2, 3, 4]
    assert BandChoice.parse("451-549,601-700nm").resolved(5, torch.from_numpy(NM)).bands == [1, 4]
    with pytest.raises(ValueError, match="no band in 700-800 nm: the file has 5 from 450 to 650 nm"):
        BandChoice.parse("450-550,700-800nm").resolved(5, torch.from_numpy(NM))
    with pytest.raises(ValueError, match="cannot select 450-550 nm: the file has no wavelengths"):
        BandChoice.parse("450-550nm").resolved(5, None)
    with pytest.raises(ValueError, match="0-1 are bands of files with 9 bands, this file has 5"):
        BandChoice.parse("0-1 of 9").resolved(5, None)


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({}, {}),
        ({"bands": "0-4"}, {}),
        ({"bands": "1-3"}, {"bands": "1,2,3 of 5"}),
        ({"bands": [3, 1]}, {"bands": "3,1 of 5"}),
        ({"bands": "500-600nm"}, {"bands": "1,2,3 of 5"}),
        ({"band_multiple": 2}, {"bands": "0,1,2,3 of 5"}),
        ({"wavelengths": [502.25, 600]}, {"wavelengths": [502.25, 600]}),
        ({"resample": [455.123, 600]}, {"resample": [455.123, 600]}),
    ],
)
@pytest.mark.filterwarnings("ignore:5 bands are no multiple")
def test_statistics_tell_the_choice_that_reads_the_same_bands_again(tmp_path, values, asked, chosen):
    np.savez(tmp_path / "a.npz", cube=values, wavelengths=NM)
    data = PairedFolder(tmp_path, **asked)
    found = described_choice(data.normalization.selection["hsi"])
    assert found == chosen
    again = PairedFolder(tmp_path, **found)
    assert torch.equal(again[0].hsi, data[0].hsi)


def test_a_number_of_bands_that_is_no_multiple_is_cut_with_a_warning(tmp_path, values):
    values[1] = -1
    np.savez(tmp_path / "a.npz", cube=values, wavelengths=NM, nodata=-1)
    warned = (
        "4 bands are no multiple of the patch's 3: left out bands 4; choose others by bands=, wavelengths= or resample="
    )
    with (
        pytest.warns(UserWarning, match=r"a\.npz is nodata throughout in bands 1"),
        pytest.warns(UserWarning, match=warned),
    ):
        data = PairedFolder(tmp_path, band_multiple=3)
    assert data.wavelengths.tolist() == [450, 550, 600]
    torch.testing.assert_close(data.normalization.invert("hsi", data[0].hsi[0]), torch.from_numpy(values[[0, 2, 3]]))
    with pytest.raises(ValueError, match="4 bands are fewer than the 8"), pytest.warns(UserWarning, match="nodata"):
        PairedFolder(tmp_path, band_multiple=8)


def test_files_of_other_numbers_of_bands_name_the_options(tmp_path, values):
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", values[:4])
    with pytest.raises(
        ValueError, match=r"b.npy has 4 bands, .*a.npy has 5; .* \(--bands, --wavelengths, --resample\)"
    ):
        PairedFolder(tmp_path)[1]


def test_a_choice_takes_arrays(values):
    cube = make_cube(values)
    for asked, bands in (({"wavelengths": NM[[3, 0]]}, [3, 0]), ({"bands": np.array([2, 4])}, [2, 4])):
        choice = BandChoice(**asked)
        np.testing.assert_array_equal(choice.apply(cube).values.numpy(), values[bands])
        assert choice.labels(5) == [f"{value:g}" for value in next(iter(asked.values()))]
    with pytest.raises(ValueError, match="wavelengths has 500 twice"):
        BandChoice(wavelengths=np.array([500.0, 450.0, 500.0]))


def test_a_choice_of_many_bands_is_compared_once_each():
    compared = 0

    class Band(int):
        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return int(self) == int(other)

        __hash__ = int.__hash__

    BandChoice(bands=[Band(number) for number in range(2000)], total=2000)
    assert compared < 20_000
    with pytest.raises(ValueError, match="0-1999 are bands of files with 2000 bands"):
        BandChoice(bands=[Band(number) for number in range(2000)], total=2000).resolved(3, None)
    assert compared < 40_000

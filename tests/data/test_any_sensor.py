"""Spectra of other sensors: interpolated by wavelength, bands without data left out, wrong wavelengths refused."""

import warnings

import numpy as np
import pytest
import torch

from mmmae.data import Cube, Normalization, PairedFolder, read_cube, resample_bands

NM = [450.0, 500.0, 550.0, 600.0, 650.0]


def cube(values, wavelengths=NM, nodata=None):
    tensor = torch.as_tensor(values, dtype=torch.float32)
    nm = None if wavelengths is None else torch.tensor(wavelengths)
    return Cube(tensor, nm, torch.zeros_like(tensor, dtype=torch.bool) if nodata is None else nodata)


def write(folder, name, values, wavelengths=NM, nodata=-1.0):
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", cube=values.astype(np.float32), wavelengths=wavelengths, nodata=nodata)


def test_spectra_are_interpolated_linearly(values):
    asked = [500.0, 475.0, 640.0, 450.0, 650.0]
    made = resample_bands(cube(values), asked)
    assert made.wavelengths.tolist() == asked
    expected = np.stack([np.interp(asked, NM, spectrum) for spectrum in values.reshape(5, -1).T]).T
    np.testing.assert_allclose(made.values.reshape(5, -1), expected, rtol=1e-6)
    np.testing.assert_array_equal(made.values[[0, 3, 4]], values[[1, 0, 4]])  # a band that is there is that band


def test_the_order_of_the_bands_does_not_matter(values):
    order = [3, 0, 4, 1, 2]
    shuffled = cube(values[order], [NM[band] for band in order])
    assert torch.equal(
        resample_bands(shuffled, [460, 555, 650]).values, resample_bands(cube(values), [460, 555, 650]).values
    )


def test_beyond_the_range_the_last_band_stands_within_the_tolerance(values):
    made = resample_bands(cube(values), [442, 658])
    np.testing.assert_array_equal(made.values, values[[0, 4]])
    assert made.wavelengths.tolist() == [442, 658]
    with pytest.raises(ValueError, match=r"430, 700 nm is more than 10 nm outside the file's bands, 450 to 650 nm"):
        resample_bands(cube(values), [430, 500, 700])


def test_nodata_is_where_a_band_it_needs_is_nodata(values):
    nodata = torch.zeros(5, 6, 7, dtype=torch.bool)
    nodata[2, 1, 1] = True
    made = resample_bands(cube(values, nodata=nodata), [500, 525, 550, 575, 600])
    assert made.nodata[:, 1, 1].tolist() == [False, True, True, True, False]
    assert made.values[1:4, 1, 1].abs().max() == 0
    assert made.nodata.sum() == 3


def test_bands_of_one_wavelength_are_no_division_by_zero(values):
    made = resample_bands(cube(values[:3], [500.0, 500.0, 600.0]), [500, 550])
    assert torch.isfinite(made.values).all()


def test_without_wavelengths_there_is_no_resampling(values):
    with pytest.raises(ValueError, match="the file has no wavelengths"):
        resample_bands(cube(values, None), [500])
    with pytest.raises(ValueError, match="wavelengths is empty"):
        resample_bands(cube(values), [])


def test_a_folder_of_several_sensors_is_read_at_one_set_of_wavelengths(tmp_path, values):
    other = np.array([440.0, 520.0, 700.0])
    write(tmp_path / "hsi", "a", values)
    write(tmp_path / "hsi", "b", np.broadcast_to(other[:, None, None], (3, 6, 7)), other)  # reflects its wavelength
    data = PairedFolder(tmp_path / "hsi", resample=[480, 560, 640])
    assert data.bands == 3
    assert data.wavelengths.tolist() == [480, 560, 640]
    raw = data.normalization.invert("hsi", data[1].hsi[0])[:, 0, 0]
    torch.testing.assert_close(raw, torch.tensor([480.0, 560.0, 640.0]))
    assert data.normalization.selection["hsi"] == "spectra at 480,560,640 nm"
    with pytest.raises(ValueError, match=r"subject 'a': .*a\.npz: 300 nm is more than"):
        PairedFolder(tmp_path / "hsi", resample=[300])
    with pytest.raises(ValueError, match="expected only one of bands="):
        PairedFolder(tmp_path / "hsi", resample=[500], wavelengths=[500])


def test_bands_that_are_nodata_in_the_first_cube_are_left_out_of_all(tmp_path, values):
    first = values.copy()
    first[[1, 4]] = -1
    write(tmp_path / "hsi", "a", first)
    write(tmp_path / "hsi", "b", values)
    with pytest.warns(UserWarning, match=r"a\.npz is nodata throughout in bands 1,4: left out of all cubes") as caught:
        data = PairedFolder(tmp_path / "hsi")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert data.left_out == ["1", "4"]
    assert "left_out=['1', '4']" in repr(data)
    assert data.bands == 3
    assert data.wavelengths.tolist() == [450, 550, 600]
    assert data.normalization.selection["hsi"] == "bands 0,2,3 of 5"
    for index, whole in enumerate((first, values)):
        assert data[index].valid.all()
        torch.testing.assert_close(
            data.normalization.invert("hsi", data[index].hsi[0]), torch.from_numpy(whole[[0, 2, 3]])
        )


@pytest.mark.parametrize(
    ("asked", "left_out", "kept"),
    [
        ({"bands": [4, 1, 0]}, ["1"], "bands 4,0 of 5"),
        ({"wavelengths": [450, 502]}, ["502"], "wavelengths 450 nm"),
        ({"resample": [450, 475, 650]}, ["475"], "spectra at 450,650 nm"),
    ],
)
def test_bands_left_out_are_named_as_they_were_asked_for(tmp_path, values, asked, left_out, kept):
    values[1] = -1
    write(tmp_path / "hsi", "a", values)
    with pytest.warns(UserWarning, match="nodata throughout"):
        data = PairedFolder(tmp_path / "hsi", **asked)
    assert data.left_out == left_out
    assert data.normalization.selection["hsi"] == kept
    assert len(data.wavelengths) == data.bands == data[0].hsi.shape[1]


def test_tiles_leave_out_what_the_whole_first_scene_lacks(tmp_path):
    values = np.random.default_rng(0).normal(5, 1, (3, 8, 16)).astype(np.float32)
    values[0] = -1
    values[1, :, :8] = -1  # the first tile lacks it, the second does not
    write(tmp_path / "hsi", "a", values, NM[:3])
    with pytest.warns(UserWarning, match="in bands 0: left out"):
        data = PairedFolder(tmp_path / "hsi", tile=8)
    assert data.bands == 2
    assert not data[0].valid.any()
    assert data[1].valid.all()


def test_whole_cubes_give_no_warning(tmp_path, values):
    write(tmp_path / "hsi", "a", values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PairedFolder(tmp_path / "hsi").left_out == []


def test_a_kept_band_that_another_cube_lacks_is_refused(tmp_path, values):
    write(tmp_path / "hsi", "a", values)
    values[3] = -1
    write(tmp_path / "hsi", "b", values)
    statistics = Normalization({"hsi": ((-1.0, 0.0, 1.0),) * 5})
    data = PairedFolder(tmp_path / "hsi", normalization=statistics)
    with pytest.raises(ValueError, match=r"subject 'b': .*b\.npz: bands 3 is nodata throughout, but not in .*a\.npz"):
        data[1]
    write(tmp_path / "hsi", "b", np.full_like(values, -1))  # nothing at all is a subject without valid pixels
    assert not data[1].valid.any()


def test_a_first_cube_without_any_data_is_refused(tmp_path, values):
    write(tmp_path / "hsi", "a", np.full_like(values, -1))
    with pytest.raises(ValueError, match=r"a\.npz: is nodata throughout"):
        PairedFolder(tmp_path / "hsi")


def test_a_wrong_number_of_wavelengths_is_refused(tmp_path, values, write_raster):
    np.savez(tmp_path / "a.npz", cube=values, wavelengths=NM[:4])
    with pytest.raises(ValueError, match=r"a\.npz: .*'wavelengths' has 4 entries, but the array has 5 bands"):
        read_cube(tmp_path / "a.npz")
    path = write_raster(tmp_path / "b.img", values)
    header = path.with_suffix(".hdr")
    header.write_text(header.read_text() + "wavelength = {450, 500, 550, 600}\n")
    with pytest.raises(ValueError, match=r"b\.img: .*lists 4 wavelengths for 5 bands"):
        read_cube(path)


def test_a_cube_without_wavelengths_among_others_is_refused(tmp_path, values):
    write(tmp_path, "a", values)
    np.save(tmp_path / "b.npy", values)
    data = PairedFolder(tmp_path, normalization=Normalization({"hsi": ((-1.0, 0.0, 1.0),) * 5}))
    with pytest.raises(ValueError, match=r"subject 'b': .*b\.npy has no wavelengths, .*a\.npz has"):
        data[1]
    (tmp_path / "b.npy").rename(tmp_path / "0.npy")
    data = PairedFolder(tmp_path, normalization=Normalization({"hsi": ((-1.0, 0.0, 1.0),) * 5}))
    with pytest.raises(ValueError, match=r"subject 'a': .*0\.npy has no wavelengths, .*a\.npz has"):
        data[1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bands": [1, 1]}, "bands has 1 twice"),
        ({"wavelengths": [500.0, 550.0, 500.0]}, "wavelengths has 500 twice"),
        ({"resample": [500, 500]}, "resample has 500 twice"),
    ],
)
def test_a_band_that_is_asked_for_twice_is_refused(tmp_path, values, asked, message):
    write(tmp_path, "a", values)
    with pytest.raises(ValueError, match=message):
        PairedFolder(tmp_path, **asked)


def test_a_nodata_value_in_an_npz_file_declares_nodata(tmp_path, values):
    values[2, 3, 4] = np.nan
    np.savez(tmp_path / "a.npz", cube=values, nodata=np.nan)
    assert read_cube(tmp_path / "a.npz").nodata.nonzero().tolist() == [[2, 3, 4]]

"""The order of an array's axes is found by names, wavelengths or sizes, or asked for."""

import h5py
import numpy as np
import pytest

from mmmae.data import read_cube
from mmmae.data.readers.axes import axes_by_name
from tests.data.container_files import write

THW, HWT, HTW = "THW", "HWT", "HTW"


@pytest.mark.parametrize(
    ("sizes", "axes", "matlab"),
    [
        ((12, 64, 64), THW, None),  # a square image
        ((64, 64, 12), HWT, HWT),
        ((45, 45, 60), None, HWT),  # 45 bands of 45 x 60 or 60 bands of a square image
        ((24, 24, 12), HWT, HWT),
        ((64, 12, 64), HTW, None),
        ((64, 200, 64), None, HWT),  # rows x bands x columns only where the bands are clearly few
        ((61, 34, 10), HWT, HWT),  # clearly few
        ((10, 61, 34), THW, None),
        ((3, 9, 10), THW, None),
        ((8, 10, 1), HWT, HWT),
        ((12, 24, 30), THW, None),  # the only reading with an image of 16 rows and columns
        ((24, 30, 12), HWT, HWT),
        ((5, 6, 7), THW, HWT),  # too small to tell: the convention
        ((40, 50, 200), None, HWT),
        ((64, 64, 64), None, HWT),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5", ".mat", "_v73.mat"])
def test_sizes_tell_the_axes_or_are_asked_for(tmp_path, sizes, axes, matlab, suffix):
    values = np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)
    path = tmp_path / f"a{suffix}"
    write(path, cube=values)
    expected, given = matlab if suffix.endswith(".mat") else axes, None
    if expected is None:
        with pytest.raises(ValueError, match=r"do not tell which axis .* by axes= \(--axes\)"):
            read_cube(path)
        expected = given = HWT
    cube = read_cube(path, axes=given)
    np.testing.assert_array_equal(cube.values.numpy(), values.transpose([expected.index(axis) for axis in THW]))


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".mat", "_v73.mat"])
@pytest.mark.parametrize("axes", [THW, HWT, HTW])
def test_the_axis_as_long_as_the_wavelengths_is_that_of_the_bands(tmp_path, suffix, axes):
    values = np.random.default_rng(0).normal(size=(40, 50, 200)).astype(np.float32)
    stored = values.transpose([THW.index(axis) for axis in axes])
    write(tmp_path / f"a{suffix}", cube=stored, wavelengths=np.linspace(400, 900, 40))
    cube = read_cube(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(cube.values.numpy(), values)
    assert cube.wavelengths[-1] == 900


def test_wavelengths_given_tell_the_axis_too(tmp_path):
    values = np.random.default_rng(0).normal(size=(40, 50, 200)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    cube = read_cube(tmp_path / "a.npy", wavelengths=np.linspace(400, 900, 200))
    np.testing.assert_array_equal(cube.values.numpy(), values.transpose(2, 0, 1))


def test_wavelengths_that_fit_two_axes_do_not_tell(tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 50, 30)).astype(np.float32)
    np.savez(tmp_path / "a.npz", cube=values, wavelengths=np.linspace(400, 900, 50))
    with pytest.raises(ValueError, match=r"2 axes of the size of its 50 wavelengths.*--axes"):
        read_cube(tmp_path / "a.npz")
    assert read_cube(tmp_path / "a.npz", axes=THW).values.shape == (50, 50, 30)


def test_names_of_axes_tell_before_anything_else(tmp_path):
    values = np.random.default_rng(0).normal(size=(40, 50, 200)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"], file["wavelengths"] = values, np.linspace(400, 900, 40)
        for axis, name in enumerate(("lon", "lat", "band")):
            file["cube"].dims[axis].label = name
        del file["wavelengths"]
    np.testing.assert_array_equal(read_cube(tmp_path / "a.h5").values.numpy(), values.transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("names", "axes"),
    [
        (("downtrack", "crosstrack", "bands"), HWT),
        (("number_of_lines", "pixels_per_line", "wavelength_3d"), HWT),
        (("blue_bands", "number_of_scans", "ccd_pixels"), THW),
        (("wavelength", "northing", "easting"), THW),
        (("x", "y", "band"), "WHT"),
        (("a", "y", "band"), None),
        (("y", "lat", "band"), None),
        (("", "", ""), None),
    ],
)
def test_names_of_axes(names, axes):
    assert axes_by_name(names) == axes


def test_an_image_of_one_band_may_be_transposed(tmp_path):
    image = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    np.save(tmp_path / "a.npy", image)
    np.testing.assert_array_equal(read_cube(tmp_path / "a.npy", axes="WH").values.numpy(), image.T[None])
    np.testing.assert_array_equal(read_cube(tmp_path / "a.npy", axes="WHT").values.numpy(), image.T[None])
    np.testing.assert_array_equal(read_cube(tmp_path / "a.npy", axes="THW").values.numpy(), image[None])

"""Matrices of bands x pixels become cubes where their file says the size of the image, and are refused elsewhere."""

import numpy as np
import pytest

from mmmae.data import read_cube
from mmmae.data.readers.windows import Window
from tests.data.container_files import write

SIZES = [("nRow", "nCol"), ("lines", "cols"), ("H", "W"), ("height", "width"), ("rows", "columns"), ("nrows", "ncols")]


@pytest.fixture
def cube():
    return np.random.default_rng(0).normal(size=(20, 9, 7)).astype(np.float32)  # bands, rows, columns


@pytest.mark.parametrize("suffix", [".mat", "_v73.mat"])
@pytest.mark.parametrize("names", SIZES)
@pytest.mark.parametrize("bands_first", [True, False])
def test_a_matrix_with_its_size_beside_it_is_a_cube(tmp_path, cube, suffix, names, bands_first):
    matrix = cube.transpose(0, 2, 1).reshape(20, 63)  # column by column, as MATLAB's reshape takes them
    path = tmp_path / f"jasper{suffix}"
    write(path, Y=matrix if bands_first else matrix.T, **{names[0]: np.float64(9), names[1]: np.float64(7)})
    read = read_cube(path)
    np.testing.assert_array_equal(read.values.numpy(), cube)
    assert "matrix" in read.notes[0]
    part = read_cube(path, window=Window(2, 1, 5, 4))
    np.testing.assert_array_equal(part.values.numpy(), cube[:, 2:7, 1:5])


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_matrix_whose_order_of_pixels_is_not_known_is_refused(tmp_path, cube, suffix):
    write(tmp_path / f"a{suffix}", Y=cube.reshape(20, 63), nRow=9, nCol=7)
    with pytest.raises(ValueError, match=r"could be a matrix of bands x pixels.*--axes HW"):
        read_cube(tmp_path / f"a{suffix}")
    assert read_cube(tmp_path / f"a{suffix}", axes="HW").values.shape == (1, 20, 63)


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".mat", "_v73.mat"])
def test_a_matrix_with_wavelengths_and_no_size_is_refused(tmp_path, cube, suffix):
    write(tmp_path / f"a{suffix}", Y=cube.reshape(20, 63), wavelengths=np.linspace(400, 900, 20))
    with pytest.raises(ValueError, match="could be a matrix of bands x pixels"):
        read_cube(tmp_path / f"a{suffix}")


def test_a_matrix_that_fits_in_two_ways_is_refused(tmp_path):
    matrix = np.random.default_rng(0).normal(size=(63, 63))
    write(tmp_path / "a.mat", Y=matrix, nRow=9, nCol=7)
    with pytest.raises(ValueError, match="both axes"):
        read_cube(tmp_path / "a.mat")


def test_an_image_with_its_own_size_beside_it_stays_an_image(tmp_path):
    image = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    write(tmp_path / "a.mat", image=image, nRow=9, nCol=7)
    np.testing.assert_array_equal(read_cube(tmp_path / "a.mat").values.numpy(), image[None])

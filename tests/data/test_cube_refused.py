"""A damaged or ambiguous file is refused with one message that names it, and no pickle is ever loaded."""

import pickle

import numpy as np
import pytest
import torch

from mmmae.data import read_cube

NM = np.array([450.0, 500.0, 550.0, 600.0, 650.0])

CONTAINERS = ["a.npy", "a.npz", "a.mat", "a_v73.mat", "a.h5", "a.hdf5", "a.he5"]
RASTERS = ["a.tif", "a.tiff", "a.img"]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [*CONTAINERS, *RASTERS])
def test_undeclared_nan_and_infinity_are_refused_with_file_band_and_count(tmp_path, write_cube, values, name, broken):
    values[3, 0, :4] = broken
    path = write_cube(tmp_path / name, values)
    with pytest.raises(ValueError, match=r"4 in band 3.*not declare") as error:
        read_cube(path)
    assert str(path) in str(error.value)
    cube = read_cube(path, check_finite=False)
    assert cube.nodata.sum() == 4
    assert torch.isfinite(cube.values).all()


def test_nan_is_refused_where_another_nodata_value_is_declared(tmp_path, write_raster, values):
    values[3, 0, 0] = np.nan
    with pytest.raises(ValueError, match="1 in band 3"):
        read_cube(write_raster(tmp_path / "a.tif", values, nodata=-9999))


def test_values_beyond_float32_are_refused(tmp_path, write_raster, values):
    big = values.astype(np.float64)
    big[1, 2, 3] = 1e39
    with pytest.raises(ValueError, match=r"too large for float32: 1 in band 1"):
        read_cube(write_raster(tmp_path / "a.tif", big))


@pytest.mark.parametrize("name", [*CONTAINERS, *RASTERS])
def test_a_file_cut_anywhere_is_refused_or_reads_the_same(tmp_path, write_cube, values, name):
    path = write_cube(tmp_path / name, values)
    whole = path.read_bytes()
    lengths = {0, 1, len(whole) - 1, *np.linspace(0, len(whole) - 1, 40).astype(int).tolist()}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        try:
            cube = read_cube(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            np.testing.assert_array_equal(cube.values.numpy(), values)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        read_cube(path)


def test_a_compressed_tiled_geotiff_cut_short_is_refused(tmp_path, write_raster):
    values = np.random.default_rng(0).uniform(size=(3, 40, 40)).astype(np.float32)
    path = write_raster(tmp_path / "a.tif", values, compress="deflate", tiled=True, blockxsize=16, blockysize=16)
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 30).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read as a TIFF"):
            read_cube(path)


def test_an_envi_header_cut_short_is_refused(tmp_path, write_raster, values):
    path = write_raster(tmp_path / "a.img", values)
    header = path.with_suffix(".hdr")
    whole = header.read_text() + f"wavelength = {{{', '.join(map(str, NM))}}}\n"
    for length in range(len(whole)):
        header.write_text(whole[:length])
        try:
            cube = read_cube(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            np.testing.assert_array_equal(cube.values.numpy(), values)
            assert cube.wavelengths is None or len(cube.wavelengths) == len(NM)
    header.write_text(whole[: whole.index("600")])
    with pytest.raises(ValueError, match="truncated"):
        read_cube(path)


@pytest.mark.parametrize("name", ["b.tif", "b.img"])
def test_a_file_of_another_format_under_a_raster_suffix_is_refused(tmp_path, write_raster, values, name):
    write_raster(tmp_path / "b.img", values)
    write_raster(tmp_path / "a.tif", values)
    source = '<SourceFilename relativeToVRT="1">a.tif</SourceFilename><SourceBand>1</SourceBand>'
    band = f'<VRTRasterBand dataType="Float32" band="1"><SimpleSource>{source}</SimpleSource></VRTRasterBand>'
    (tmp_path / name).write_text(f'<VRTDataset rasterXSize="7" rasterYSize="6">{band}</VRTDataset>')
    with pytest.raises(ValueError, match="cannot be read"):
        read_cube(tmp_path / name)


@pytest.mark.parametrize("name", ["a.hdr", "a.img", "a.dat"])
def test_half_an_envi_pair_is_refused(tmp_path, write_raster, values, name):
    write_raster(tmp_path / "b.img", values)
    (tmp_path / ("b.hdr" if name == "a.hdr" else "b.img")).rename(tmp_path / name)
    with pytest.raises(ValueError, match=r"expected"):
        read_cube(tmp_path / name)


def test_a_header_with_two_data_files_is_refused(tmp_path, write_raster, values):
    path = write_raster(tmp_path / "a.img", values)
    (tmp_path / "a.dat").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"a\.img, a\.dat"):
        read_cube(tmp_path / "a.hdr")


def test_an_unknown_path_suffix_or_folder_is_refused(tmp_path):
    (tmp_path / "a.xyz").write_bytes(b"1")
    (tmp_path / "b.tif").mkdir()
    with pytest.raises(FileNotFoundError, match=r"missing\.tif"):
        read_cube(tmp_path / "missing.tif")
    with pytest.raises(ValueError, match=r"a\.xyz: unknown suffix '\.xyz', expected one of .*\.tif"):
        read_cube(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match=r"b\.tif: is a folder"):
        read_cube(tmp_path / "b.tif")


@pytest.mark.parametrize("name", ["a.tif", *CONTAINERS])
def test_complex_values_are_refused(tmp_path, write_cube, values, name):
    path = write_cube(tmp_path / name, values.astype(np.complex64))
    with pytest.raises(ValueError, match=r"a(_v73)?\..*(complex|has type)"):
        read_cube(path)


@pytest.mark.parametrize("name", CONTAINERS)
def test_arrays_without_values_are_refused(tmp_path, write_cube, name):
    with pytest.raises(ValueError, match=rf"{name}.*"):
        read_cube(write_cube(tmp_path / name, np.zeros((3, 0, 4))))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_no_pickle_is_ever_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", cube=np.array([Bomb()], dtype=object))
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.npy", "a.npz", "b.npy", "b.npz"):
        with pytest.raises(ValueError, match=name):
            read_cube(tmp_path / name)


def test_an_object_array_beside_the_cube_is_left_alone(tmp_path, values):
    np.savez(tmp_path / "a.npz", cube=values, notes=np.array([Bomb()], dtype=object))
    np.testing.assert_array_equal(read_cube(tmp_path / "a.npz").values.numpy(), values)


def test_axes_that_are_no_permutation_or_not_for_the_format_are_refused(tmp_path, write_raster, values):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match="expected the letters T, H and W"):
        read_cube(tmp_path / "a.npy", axes="TWX")
    with pytest.raises(ValueError, match=r"a\.img: dataset= and axes= \(--dataset, --axes\) are for"):
        read_cube(write_raster(tmp_path / "a.img", values), axes="HWT")
    with pytest.raises(ValueError, match=r"a\.tif.*axes= \(--axes\) is for TIFF files of several pages"):
        read_cube(write_raster(tmp_path / "a.tif", values), axes="HWT")


@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 3, 4)])
def test_other_ranks_are_refused(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(ValueError, match=r"a\.npy.*expected 2 or 3 dimensions"):
        read_cube(tmp_path / "a.npy")


def test_a_nodata_value_that_the_type_cannot_hold_is_refused(tmp_path, values):
    np.save(tmp_path / "a.npy", (values * 100).astype(np.uint16))
    with pytest.raises(
        ValueError, match=r"a\.npy: nodata= \(--nodata\) is -9999, which values of type uint16 cannot be"
    ):
        read_cube(tmp_path / "a.npy", nodata=-9999)
    assert not read_cube(tmp_path / "a.npy", nodata=float("nan")).nodata.any()


def test_a_file_that_is_refused_for_its_values_can_be_read(tmp_path, values):
    values[3, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match=r"a\.npy: NaN or infinite values: 1 in band 3"):
        read_cube(tmp_path / "a.npy")


def test_a_message_is_ours_and_not_that_of_its_cause(tmp_path, write_raster, values, monkeypatch):
    def fail(*_):
        raise ValueError("what is wrong with the header") from KeyError("samples")

    monkeypatch.setattr("mmmae.data.readers.cube.read_envi", fail)
    with pytest.raises(ValueError, match="cannot be read as an ENVI file: what is wrong with the header"):
        read_cube(write_raster(tmp_path / "a.img", values))

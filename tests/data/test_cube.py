"""Every format reads back what was written: values, wavelengths, nodata."""

import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from mmmae.data import read_cube
from mmmae.data.readers.cube import read_layout
from mmmae.data.readers.windows import Window

NM = np.array([450.0, 500.0, 550.0, 600.0, 650.0])

CONTAINERS = ["a.npy", "a.npz", "a.mat", "a_v73.mat", "a.h5", "a.hdf5", "a.he5"]
RASTERS = ["a.tif", "a.tiff", "a.img"]


@pytest.mark.parametrize("name", [*CONTAINERS, *RASTERS])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64"])
def test_each_format_reads_back_what_was_written(tmp_path, write_cube, values, name, dtype):
    written = (values * 100).astype(dtype)
    cube = read_cube(write_cube(tmp_path / name, written))
    assert cube.values.dtype == torch.float32
    np.testing.assert_array_equal(cube.values.numpy(), written.astype(np.float32))
    assert cube.nodata.shape == cube.values.shape
    assert cube.nodata.dtype == torch.bool
    assert not cube.nodata.any()
    assert cube.wavelengths is None


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name != "a.npy"])
def test_containers_carry_wavelengths(tmp_path, write_cube, values, name):
    cube = read_cube(write_cube(tmp_path / name, values, wavelengths=NM))
    np.testing.assert_array_equal(cube.wavelengths.numpy(), NM.astype(np.float32))
    np.testing.assert_array_equal(cube.values.numpy(), values)


@pytest.mark.parametrize(
    ("unit", "factor"), [("Nanometers", 1), ("Micrometers", 1000), ("um", 1000), ("Unknown", 1000), (None, 1)]
)
def test_envi_wavelengths_are_nm_whatever_the_unit(tmp_path, write_raster, values, unit, factor):
    path = write_raster(tmp_path / "a.img", values)
    header = path.with_suffix(".hdr")
    lines = f"wavelength = {{{', '.join(str(value / factor) for value in NM)}}}\n"
    lines += f"wavelength units = {unit}\n" if unit else ""
    header.write_text(header.read_text() + lines)
    for entry in (path, header):
        np.testing.assert_allclose(read_cube(entry).wavelengths.numpy(), NM, rtol=1e-6)


def test_envi_wavelengths_in_an_unknown_physical_unit_are_none(tmp_path, write_raster, values):
    path = write_raster(tmp_path / "a.img", values)
    header = path.with_suffix(".hdr")
    header.write_text(header.read_text() + "wavelength units = Wavenumber\nwavelength = {1, 2, 3, 4, 5}\n")
    assert read_cube(path).wavelengths is None


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
@pytest.mark.parametrize("data_name", ["a.img", "a.dat", "a.bsq", "a.IMG", "a"])
def test_envi_reads_any_interleave_and_data_name(tmp_path, write_raster, values, interleave, data_name):
    path = write_raster(tmp_path / "a.img", values, interleave=interleave)
    if data_name != "a.img":
        path.rename(tmp_path / data_name)
    cube = read_cube(tmp_path / "a.hdr")
    np.testing.assert_array_equal(cube.values.numpy(), values)
    if data_name != "a":
        np.testing.assert_array_equal(read_cube(tmp_path / data_name).values.numpy(), values)


def test_envi_header_may_be_named_after_the_data_file(tmp_path, write_raster, values):
    path = write_raster(tmp_path / "a.img", values)
    (tmp_path / "a.hdr").rename(tmp_path / "a.img.hdr")
    for entry in (path, tmp_path / "a.img.hdr"):
        np.testing.assert_array_equal(read_cube(entry).values.numpy(), values)


def test_geotiff_wavelengths_come_from_band_tags_or_descriptions(tmp_path, write_raster, values):
    tags = {band: {"wavelength": str(nm / 1000), "wavelength_units": "um"} for band, nm in enumerate(NM, start=1)}
    tagged = write_raster(tmp_path / "tags.tif", values, tags=tags)
    described = write_raster(tmp_path / "text.tif", values, descriptions=[f"Band ({nm:.1f} Nanometers)" for nm in NM])
    partly = write_raster(tmp_path / "partly.tif", values, descriptions=["450 nm", "500 nm"])
    for path in (tagged, described):
        np.testing.assert_allclose(read_cube(path).wavelengths.numpy(), NM, rtol=1e-6)
    assert read_cube(partly).wavelengths is None


def test_a_declared_nodata_value_is_masked_and_set_to_zero(tmp_path, write_raster, values):
    values[2, 3, 4] = -9999
    for name in ("a.tif", "a.img"):
        cube = read_cube(write_raster(tmp_path / name, values, nodata=-9999))
        assert cube.nodata.nonzero().tolist() == [[2, 3, 4]]
        assert cube.values[2, 3, 4] == 0


def test_declared_nan_is_nodata(tmp_path, write_raster, values):
    values[2, 3, 4] = np.nan
    cube = read_cube(write_raster(tmp_path / "a.tif", values, nodata=float("nan")))
    assert cube.nodata.nonzero().tolist() == [[2, 3, 4]]
    assert torch.isfinite(cube.values).all()


def test_the_mask_of_a_geotiff_is_nodata(tmp_path, write_raster, values):
    values[:, 0, 0] = np.nan
    mask = np.ones((6, 7), dtype=bool)
    mask[0, 0] = False
    cube = read_cube(write_raster(tmp_path / "a.tif", values, mask=mask))
    assert cube.nodata[:, 0, 0].all()
    assert cube.nodata.sum() == 5


def test_the_fill_value_of_hdf5_is_nodata(tmp_path, write_cube, values):
    values[1, 1, 1] = -1
    path = write_cube(tmp_path / "a.h5", values)
    with h5py.File(path, "r+") as file:
        file["cube"].attrs["_FillValue"] = np.float32([-1])
    assert read_cube(path).nodata.nonzero().tolist() == [[1, 1, 1]]


def test_a_fourth_8_bit_band_is_no_alpha_mask(tmp_path, write_raster):
    values = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    cube = read_cube(write_raster(tmp_path / "a.tif", values))
    np.testing.assert_array_equal(cube.values.numpy(), values)
    assert not cube.nodata.any()


def test_a_declared_scale_and_offset_are_applied(tmp_path, write_raster, values):
    import rasterio

    path = write_raster(tmp_path / "a.tif", (values * 1000).astype(np.int16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "r+") as target:
            target.scales, target.offsets = [0.001] * 5, [-0.5] * 5
    np.testing.assert_allclose(read_cube(path).values.numpy(), values - 0.5, atol=1e-3)


def test_no_warning_reaches_the_user(tmp_path, write_raster, values):
    paths = [write_raster(tmp_path / name, values) for name in RASTERS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            read_cube(path)


@pytest.mark.parametrize("name", ["a.npz", "a.mat", "a_v73.mat", "a.h5"])
def test_one_of_several_arrays_is_named_or_the_candidates_are_listed(tmp_path, values, name):
    path = tmp_path / name
    if name == "a.npz":
        np.savez(path, first=values, second=values + 1)
    elif name == "a.mat":
        scipy.io.savemat(path, {"first": values.transpose(1, 2, 0), "second": values.transpose(1, 2, 0) + 1})
    else:
        order = (0, 2, 1) if name == "a_v73.mat" else (0, 1, 2)
        with h5py.File(path, "w") as file:
            file["first"], file["second"] = values.transpose(order), values.transpose(order) + 1
    shape = r"\[6, 7, 5\]" if name.endswith(".mat") else r"\[5, 6, 7\]"
    with pytest.raises(ValueError, match=rf"dataset=: first {shape}, second {shape}"):
        read_cube(path)
    np.testing.assert_array_equal(read_cube(path, dataset="second").values.numpy(), values + 1)
    with pytest.raises(ValueError, match=r"no array 'third'; the file has first"):
        read_cube(path, dataset="third")


def test_an_hdf5_array_in_a_group_is_found_and_named_by_its_path(tmp_path, values):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scene/cube"], file["scene/quality"] = values, values[0]
        file["scene/wavelength"] = NM / 1000
        file["scene/wavelength"].attrs["units"] = "micrometers"
    for dataset in (None, "scene/cube", "/scene/cube"):
        cube = read_cube(tmp_path / "a.h5", dataset=dataset)
        np.testing.assert_array_equal(cube.values.numpy(), values)
        np.testing.assert_allclose(cube.wavelengths.numpy(), NM, rtol=1e-6)


@pytest.mark.parametrize("axes", ["THW", "HWT", "HTW"])
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.mat", "a.h5"])
def test_axes_say_which_axis_is_which(tmp_path, values, name, axes):
    stored = values.transpose(["THW".index(axis) for axis in axes])
    if name == "a.mat":
        scipy.io.savemat(tmp_path / name, {"cube": stored})
    elif name == "a.npy":
        np.save(tmp_path / name, stored)
    elif name == "a.npz":
        np.savez(tmp_path / name, cube=stored)
    else:
        with h5py.File(tmp_path / name, "w") as file:
            file["cube"] = stored
    np.testing.assert_array_equal(read_cube(tmp_path / name, axes=axes).values.numpy(), values)


def test_wavelengths_that_fit_another_axis_show_that_the_axes_are_wrong(tmp_path, values):
    np.savez(tmp_path / "a.npz", cube=values.transpose(1, 2, 0), wavelengths=NM)
    with pytest.raises(ValueError, match=r"5 entries .* read as THW has 6 bands.*axes="):
        read_cube(tmp_path / "a.npz", axes="THW")
    assert len(read_cube(tmp_path / "a.npz", axes="HWT").wavelengths) == 5


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.mat", "a_v73.mat", "a.h5"])
def test_a_2d_array_is_one_band(tmp_path, name):
    image = np.random.default_rng(0).uniform(size=(4, 6)).astype(np.float32)
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, image)
    elif name == "a.npz":
        np.savez(path, image=image, wavelengths=NM)
    elif name == "a.mat":
        scipy.io.savemat(path, {"image": image, "pixel_size": 3.0})
    else:
        with h5py.File(path, "w") as file:
            file["image"] = image.T if name.endswith(".mat") else image
    np.testing.assert_array_equal(read_cube(path).values.numpy(), image[None])


@pytest.mark.parametrize("name", ["a b#1?.tif", "s3:x.tif", "zip!x.tif", "ü.tif"])
def test_odd_file_names_are_read(tmp_path, monkeypatch, write_raster, values, name):
    write_raster(tmp_path / "plain.tif", values).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, name):
        np.testing.assert_array_equal(read_cube(path).values.numpy(), values)


def test_a_relative_path_and_a_string_are_read(tmp_path, monkeypatch, values):
    np.save(tmp_path / "a.npy", values)
    monkeypatch.chdir(tmp_path)
    assert read_cube("a.npy").values.shape == (5, 6, 7)
    assert read_cube(Path("a.npy")).values.shape == (5, 6, 7)


def test_a_nodata_value_counts_beside_a_mask(tmp_path, write_raster, values):
    values[:, 0, 0] = -9999
    mask = np.ones((6, 7), dtype=bool)
    mask[5, 5] = False
    nodata = read_cube(write_raster(tmp_path / "a.tif", values, nodata=-9999, mask=mask)).nodata
    assert nodata[0].nonzero().tolist() == [[0, 0], [5, 5]]
    assert nodata.sum() == 10


def test_a_scale_and_an_offset_of_a_geotiff_are_noted(tmp_path, write_raster, values):
    import rasterio

    path = write_raster(tmp_path / "a.tif", values, nodata=-1)
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = [0.5] * 5, [1, 2, 3, 4, 5]
    expected = ("values are multiplied by 0.5 (scale)", "one number a band is added to values (offset)")
    assert read_cube(path).notes == read_layout(path).notes == expected


def test_blocks_that_a_geotiff_leaves_out_are_nodata(tmp_path):
    import rasterio

    options = {"driver": "GTiff", "width": 48, "height": 40, "count": 1, "dtype": "float32", "nodata": -9999}
    for kind, blocks in (
        ("tiles", {"tiled": True, "blockxsize": 16, "blockysize": 16}),
        ("strips", {"blockysize": 16}),
    ):
        with rasterio.open(tmp_path / f"{kind}.tif", "w", **options, **blocks, SPARSE_OK=True) as target:
            target.write(np.ones((1, 8, 48), "f4"), window=rasterio.windows.Window(0, 32, 48, 8))
        cube = read_cube(tmp_path / f"{kind}.tif")
        assert not cube.nodata[0, 32:].any()
        assert cube.nodata[0, :32].all()


def test_a_header_beside_a_geotiff_is_noted_if_it_lists_wavelengths(tmp_path, write_raster, values):
    path = write_raster(tmp_path / "a.tif", values)
    path.with_suffix(".hdr").write_text(f"ENVI\nwavelength = {{{', '.join(map(str, NM))}}}\n")
    for read in (read_cube, read_layout):
        (note,) = read(path).notes
        assert "wavelengths in a.hdr are not used" in note
        assert read(path, wavelengths=NM).notes == ()


def test_doubles_that_were_float32_have_its_nodata_value(tmp_path, values):
    values[2, 3, 4] = -9999.9
    np.save(tmp_path / "a.npy", values.astype(np.float64))
    assert read_cube(tmp_path / "a.npy", nodata=-9999.9).nodata.nonzero().tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.nc"])
def test_first_axes_of_size_1_are_left_out(tmp_path, values, name):
    stored = values[None, None]
    if name == "a.npy":
        np.save(tmp_path / name, stored)
    elif name == "a.npz":
        np.savez(tmp_path / name, cube=stored, wavelengths=NM)
    else:
        with h5py.File(tmp_path / name, "w") as file:
            file["reflectance"], file["wavelengths"] = stored, NM
            for axis, label in enumerate(("run", "time", "band", "y", "x")):
                file["reflectance"].dims[axis].label = label
    cube = read_cube(tmp_path / name)
    np.testing.assert_array_equal(cube.values.numpy(), values)
    assert (cube.wavelengths is None) == (name == "a.npy")
    part = read_cube(tmp_path / name, window=Window(1, 2, 3, 4))
    np.testing.assert_array_equal(part.values.numpy(), values[:, 1:4, 2:6])

"""Every format reads back what was written, and says what is wrong with a file that is not as it should be."""

import pickle
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from mmmae.data import read_cube, select_bands
from mmmae.data.cube import Cube

NM = np.array([450.0, 500.0, 550.0, 600.0, 650.0])


def write_container(path, values, wavelengths=None, name="cube"):
    """Write `values` `[T, H, W]` in the axis order that the format has by default."""
    hwt = np.ascontiguousarray(values.transpose(1, 2, 0))
    extra = {} if wavelengths is None else {"wavelengths": wavelengths}
    if path.name.endswith("v73.mat"):
        with h5py.File(path, "w", userblock_size=512) as file:
            for key, array in {name: hwt, **extra}.items():
                dataset = file.create_dataset(key, data=np.atleast_2d(array).T)  # MATLAB writes its axes reversed
                dataset.attrs["MATLAB_class"] = np.bytes_("double")
        with path.open("r+b") as stream:
            stream.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    elif path.suffix == ".mat":
        scipy.io.savemat(path, {name: hwt, **extra}, do_compression=True)
    elif path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **{name: values, **extra})
    else:
        with h5py.File(path, "w") as file:
            for key, array in {name: values, **extra}.items():
                file[key] = array
    return path


CONTAINERS = ["a.npy", "a.npz", "a.mat", "a_v73.mat", "a.h5", "a.hdf5", "a.he5"]
RASTERS = ["a.tif", "a.tiff", "a.img"]


@pytest.mark.parametrize("name", [*CONTAINERS, *RASTERS])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64"])
def test_each_format_reads_back_what_was_written(tmp_path, write_raster, values, name, dtype):
    written = (values * 100).astype(dtype)
    write = write_raster if name in RASTERS else write_container
    cube = read_cube(write(tmp_path / name, written))
    assert cube.values.dtype == torch.float32
    np.testing.assert_array_equal(cube.values.numpy(), written.astype(np.float32))
    assert cube.nodata.shape == cube.values.shape
    assert cube.nodata.dtype == torch.bool
    assert not cube.nodata.any()
    assert cube.wavelengths is None


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name != "a.npy"])
def test_containers_carry_wavelengths(tmp_path, values, name):
    cube = read_cube(write_container(tmp_path / name, values, NM))
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


def test_the_fill_value_of_hdf5_is_nodata(tmp_path, values):
    values[1, 1, 1] = -1
    path = write_container(tmp_path / "a.h5", values)
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


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [*CONTAINERS, *RASTERS])
def test_undeclared_nan_and_infinity_are_refused_with_file_band_and_count(tmp_path, write_raster, values, name, broken):
    values[3, 0, :4] = broken
    write = write_raster if name in RASTERS else write_container
    path = write(tmp_path / name, values)
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


def test_no_warning_reaches_the_user(tmp_path, write_raster, values):
    paths = [write_raster(tmp_path / name, values) for name in RASTERS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            read_cube(path)


@pytest.mark.parametrize("name", [*CONTAINERS, *RASTERS])
def test_a_file_cut_anywhere_is_refused_or_reads_the_same(tmp_path, write_raster, values, name):
    write = write_raster if name in RASTERS else write_container
    path = write(tmp_path / name, values)
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
        with pytest.raises(ValueError, match="cannot be read as a GeoTIFF"):
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
    with pytest.raises(ValueError, match=r"a\.xyz: unknown suffix '\.xyz'; expected one of .*\.tif"):
        read_cube(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match=r"b\.tif: is a folder"):
        read_cube(tmp_path / "b.tif")


@pytest.mark.parametrize("name", ["a.tif", *CONTAINERS])
def test_complex_values_are_refused(tmp_path, write_raster, values, name):
    write = write_raster if name in RASTERS else write_container
    path = write(tmp_path / name, values.astype(np.complex64))
    with pytest.raises(ValueError, match=r"a(_v73)?\..*(complex|has type)"):
        read_cube(path)


@pytest.mark.parametrize("name", CONTAINERS)
def test_arrays_without_values_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}.*"):
        read_cube(write_container(tmp_path / name, np.zeros((3, 0, 4))))


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


def test_axes_that_are_no_permutation_or_not_for_the_format_are_refused(tmp_path, write_raster, values):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match="expected the letters T, H and W"):
        read_cube(tmp_path / "a.npy", axes="TWX")
    with pytest.raises(ValueError, match=r"a\.tif: dataset= and axes= are for"):
        read_cube(write_raster(tmp_path / "a.tif", values), axes="HWT")


def test_wavelengths_that_fit_another_axis_show_that_the_axes_are_wrong(tmp_path, values):
    np.savez(tmp_path / "a.npz", cube=values.transpose(1, 2, 0), wavelengths=NM)
    with pytest.raises(ValueError, match=r"5 entries .* read as THW has 6 bands.*axes="):
        read_cube(tmp_path / "a.npz")
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


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 3, 4)])
def test_other_ranks_are_refused(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(ValueError, match=r"a\.npy.*expected 2 or 3 dimensions"):
        read_cube(tmp_path / "a.npy")


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
        ({"bands": []}, r"no bands asked for"),
        ({"wavelengths": []}, r"no bands asked for"),
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
    with pytest.raises(ValueError, match="but the file has none"):
        select_bands(make_cube(values, None), wavelengths=[450.0])

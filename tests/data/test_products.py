"""Products of sensors are read by their layouts: values, nodata, wavelengths, and windows of them."""

import h5py
import netCDF4
import numpy as np
import pytest
import rasterio

from mmmae.data import PairedFolder, read_cube
from mmmae.data.readers.cube import read_layout
from mmmae.data.readers.windows import Window
from tests.data.product_files import ENMAP_BAND, PRODUCTS, with_xml


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_read_as_its_layout_says(tmp_path, rng, name):
    product = PRODUCTS[name](tmp_path, rng)
    cube = read_cube(product.path)
    expected = np.where(product.nodata, 0, product.values).astype(np.float32)
    np.testing.assert_array_equal(cube.nodata.numpy(), product.nodata)
    np.testing.assert_array_max_ulp(cube.values.numpy(), expected, 1)
    np.testing.assert_allclose(cube.wavelengths.numpy(), product.wavelengths, rtol=1e-6)
    layout = read_layout(product.path)
    assert (layout.shape, layout.notes) == (cube.values.shape, cube.notes)
    np.testing.assert_array_equal(layout.wavelengths.numpy(), cube.wavelengths.numpy())
    part = read_cube(product.path, window=Window(1, 2, 9, 11))
    np.testing.assert_array_equal(part.values.numpy(), cube.values[:, 1:10, 2:13].numpy())
    np.testing.assert_array_equal(part.nodata.numpy(), cube.nodata[:, 1:10, 2:13].numpy())


def test_one_array_of_a_product_is_read_by_its_name(tmp_path, rng):
    path = PRODUCTS["PRISMA L2D"](tmp_path, rng).path
    cube = read_cube(path, dataset="HDFEOS/SWATHS/PRS_L2D_HCO/Data Fields/SWIR_Cube")
    assert cube.wavelengths.tolist() == [2497.10009765625, 1500.199951171875, 943.4000244140625]
    other = read_cube(path, dataset="HDFEOS/SWATHS/PRS_L2D_PCO/Data Fields/Cube")
    assert other.values.shape == (1, 108, 120)


def test_bands_without_wavelength_or_marked_as_bad_are_noted(tmp_path, rng):
    prisma, emit = (read_layout(PRODUCTS[name](tmp_path, rng).path) for name in ("PRISMA L2D", "EMIT L2A"))
    assert "2 bands of VNIR_Cube have no wavelength, left out" in prisma.notes
    assert any("3 bands are marked as bad" in note for note in emit.notes)


@pytest.mark.parametrize("missing", ["L2ScaleVnirMax", "List_Cw_Swir"])
def test_a_product_that_lacks_an_attribute_is_refused(tmp_path, rng, missing):
    path = PRODUCTS["PRISMA L2D"](tmp_path, rng).path
    with h5py.File(path, "r+") as file:
        del file.attrs[missing]
    with pytest.raises(ValueError, match=missing):
        read_cube(path)


@pytest.mark.parametrize("damage", ["no XML", "a band less", "text for a number", "a cut"])
def test_metadata_that_do_not_fit_are_refused(tmp_path, rng, damage):
    path = PRODUCTS["EnMAP L2A"](tmp_path, rng).path
    (metadata,) = tmp_path.glob("*METADATA.XML")
    text = metadata.read_text()
    first = text.index("</bandID>") + len("</bandID>")
    changed = {
        "no XML": "none",
        "a band less": text[: text.index("<bandID")] + text[first:],
        "text for a number": text.replace("418.0", "blue"),
        "a cut": text[: len(text) // 2],
    }[damage]
    assert changed != text
    metadata.write_text(changed)
    with pytest.raises(ValueError, match=r"METADATA\.XML (cannot be read|lists 11 bands)"):
        read_cube(path)
    metadata.unlink()
    assert read_cube(path).wavelengths is None


def test_the_images_of_both_detectors_take_their_bands(tmp_path, rng):
    path = with_xml("ENMAP01-____L1B-X", ENMAP_BAND)(tmp_path, rng).path
    with rasterio.open(path) as source:
        stored, profile = source.read(), source.profile
    for detector, bands in (("VNIR", slice(0, 5)), ("SWIR", slice(5, 12))):
        part = path.with_name(f"ENMAP01-____L1B-X-SPECTRAL_IMAGE_{detector}.TIF")
        profile["count"] = len(stored[bands])
        with rasterio.open(part, "w", **profile) as target:
            target.write(stored[bands])
        np.testing.assert_allclose(read_cube(part).wavelengths, np.linspace(418, 2445, 12)[bands], rtol=1e-6)


def test_one_band_of_a_hyperion_scene_is_refused(tmp_path, write_raster, values):
    path = write_raster(tmp_path / "EO1H0440342002212110PY_B012_L1T.TIF", values[:1], driver="GTiff")
    way_out = r"one band of a scene: stack them by gdalbuildvrt -separate scene.vrt EO1H0440342002212110PY_B\*_L1T.TIF"
    with pytest.raises(ValueError, match=f"{way_out} .*, and take scene.tif or the bands out of it$"):
        read_cube(path)


@pytest.mark.parametrize(
    ("name", "content", "way_out"),
    [
        (
            "a.hdf",
            b"\x0e\x03\x13\x01",
            "a.hdf is HDF4, which is not read: gdal_translate a.hdf a.tif .* gdalinfo a.hdf .* gdal_translate '...'",
        ),
        ("a.L1R", b"\x0e\x03\x13\x01", "a.L1R is HDF4"),
        ("a.hdf", b"\x89HDF\r\n\x1a\n", r"a.hdf is HDF5: give its name the suffix .h5, .* instead of .hdf"),
        ("a.jp2", b"\0\0\0\x0cjP  \r\n", "a.jp2 is JPEG 2000, which is not read: gdal_translate a.jp2 a.tif"),
        ("a b.jp2", b"\0\0\0\x0cjP  \r\n", "a b.jp2 is JPEG 2000, .*: gdal_translate 'a b.jp2' 'a b.tif'"),
    ],
)
def test_a_format_that_is_not_read_is_refused_with_a_way_out(tmp_path, name, content, way_out):
    (tmp_path / name).write_bytes(content + bytes(100))
    with pytest.raises(ValueError, match=way_out.replace(f"{name} ", f"{name}: ", 1)):
        read_cube(tmp_path / name)
    with pytest.raises(ValueError, match=f"no image in .*; {way_out}"):
        PairedFolder(tmp_path)


@pytest.mark.parametrize("format", ["NETCDF4", "NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET"])
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "f4", "f8", "unsigned"])
@pytest.mark.parametrize("declared", ["_FillValue", "missing_value", "default", "none"])
def test_netcdf_is_read_as_its_own_library_reads_it(tmp_path, rng, format, kind, declared):
    dtype = "i1" if kind == "unsigned" else kind
    stored = rng.integers(-100, 100, (5, 18, 20)).astype(dtype)
    path = tmp_path / "a.nc"
    with netCDF4.Dataset(path, "w", format=format) as file:
        for name, size in zip(("band", "lat", "lon"), stored.shape, strict=True):
            file.createDimension(name, size)
        fill = {"_FillValue": -77, "none": False}.get(declared)
        variable = file.createVariable("cube", dtype, ("band", "lat", "lon"), fill_value=fill)
        variable.set_auto_maskandscale(False)
        if kind == "unsigned":
            variable.setncattr("_Unsigned", "true")
        if declared == "missing_value":
            variable.missing_value = np.array(-77, dtype)
        if kind != "unsigned":
            variable.scale_factor, variable.add_offset = 0.25, -3.0
        if declared == "default":
            variable[:, 3:] = stored[:, 3:]
        else:
            variable[:] = stored
    with netCDF4.Dataset(path) as file:
        expected = file["cube"][:]
    cube = read_cube(path, check_finite=False)
    mask = np.ma.getmaskarray(expected)
    np.testing.assert_array_equal(cube.nodata.numpy(), mask)
    np.testing.assert_array_equal(cube.values.numpy(), np.ma.filled(expected, 0).astype(np.float32))

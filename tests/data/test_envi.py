"""ENVI rasters as GDAL and Spectral Python read them, and what headers of real files declare besides."""

import itertools
import warnings

import numpy as np
import pytest
import rasterio
import spectral
import torch

from mmmae.data import PairedFolder, read_cube
from mmmae.data.readers.cube import read_layout
from mmmae.data.readers.windows import Window

TYPES = {"u1": 1, "i2": 2, "i4": 3, "f4": 4, "f8": 5, "u2": 12, "u4": 13, "i8": 14, "u8": 15}
ORDERS = {"bsq": (0, 1, 2), "bil": (1, 0, 2), "bip": (1, 2, 0)}


def write_envi(folder, values, more="", *, interleave="bsq", order="<", offset=0, name="a", keys=str):
    """Write `[T, H, W]` as name.img and name.hdr, of which `more` are further lines."""
    bands, lines, samples = values.shape
    fields = {
        "samples": samples, "lines": lines, "bands": bands, "header offset": offset,
        "data type": TYPES[values.dtype.str[1:]], "interleave": interleave, "byte order": int(order == ">"),
    }  # fmt: skip
    header = "".join(f"{keys(key)} = {value}\n" for key, value in fields.items())
    (folder / f"{name}.hdr").write_text(f"ENVI\n{header}{more}\n")
    stored = values.transpose(ORDERS[interleave]).astype(values.dtype.newbyteorder(order))
    (folder / f"{name}.img").write_bytes(bytes(offset) + stored.tobytes())
    return folder / f"{name}.hdr"


def numbers(dtype, shape=(3, 4, 5)):
    values = np.random.default_rng(0).uniform(0, 200, shape)
    return (values if dtype.startswith("f") else values.round()).astype(dtype)


@pytest.mark.parametrize(("dtype", "interleave"), list(itertools.product(TYPES, ORDERS)))
@pytest.mark.parametrize("order", ["<", ">"])
def test_values_are_those_that_gdal_reads(tmp_path, dtype, interleave, order):
    values = numbers(dtype)
    path = write_envi(tmp_path, values, interleave=interleave, order=order, offset=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(tmp_path / "a.img", driver="ENVI") as source:
            expected = source.read()
    found = read_cube(path).values.numpy()
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    np.testing.assert_array_equal(found, values.astype(np.float32))
    window = read_cube(path, window=Window(1, 2, 3, 2)).values.numpy()
    np.testing.assert_array_equal(window, found[:, 1:4, 2:4])


@pytest.mark.parametrize("interleave", ORDERS)
def test_scaled_values_and_wavelengths_are_those_that_spectral_python_reads(tmp_path, interleave):
    more = "Reflectance Scale Factor = 10000\nWavelength Units = Nanometers\nWavelength = {450.5,\n 550,\n650.25}"
    path = write_envi(tmp_path, numbers("u2"), more, interleave=interleave)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = spectral.envi.open(str(path))
        expected = np.asarray(image.load()).transpose(2, 0, 1)
    cube = read_cube(path)
    np.testing.assert_array_equal(cube.values.numpy(), expected)
    np.testing.assert_array_equal(cube.wavelengths.numpy(), np.array(image.bands.centers, dtype=np.float32))


@pytest.mark.parametrize("keys", [str.upper, str.title, lambda key: f"  {key.replace(' ', '_')}\t"])
def test_keys_have_no_case(tmp_path, keys):
    values = numbers("f4")
    cube = read_cube(write_envi(tmp_path, values, "WAVELENGTH = {400, 500, 600}", keys=keys))
    np.testing.assert_array_equal(cube.values.numpy(), values)
    assert cube.wavelengths.tolist() == [400, 500, 600]


def test_comments_and_descriptions_may_hold_braces_and_keys(tmp_path):
    values = numbers("f4")
    more = "; bands = {7,\ndescription = {a {nested}\n bands = 9 } text\n; }\n end}\n  ; wavelength = {1, 2\n"
    more += "wavelength = {\n400, 500,\n; a comment in a list {\n600}\r\n"
    cube = read_cube(write_envi(tmp_path, values, more))
    np.testing.assert_array_equal(cube.values.numpy(), values)
    assert cube.wavelengths.tolist() == [400, 500, 600]
    assert cube.notes == ()


def test_bad_bands_are_nodata_and_left_out_with_a_warning(tmp_path):
    for name in "ab":
        write_envi(tmp_path, numbers("f4"), "bbl = {1, 0, 1}\nwavelength = {400, 500, 600}", name=name)
    cube = read_cube(tmp_path / "a.hdr")
    assert cube.nodata.flatten(1).all(1).tolist() == [False, True, False]
    assert cube.notes == read_layout(tmp_path / "a.hdr").notes == ("band 1 is marked as bad (bbl)",)
    with pytest.warns(UserWarning, match="bands 1: left out of all cubes"):
        data = PairedFolder(tmp_path)
    assert data.bands == 2
    assert data.wavelengths.tolist() == [400, 600]
    assert data[0].valid.all()


def test_a_folder_warns_once_of_what_a_file_notes_that_the_first_does_not(tmp_path):
    for name, factor in (("a", 100), ("b", 100), ("c", 255)):
        write_envi(tmp_path, numbers("u2"), f"reflectance scale factor = {factor}", name=name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = PairedFolder(tmp_path)
        for number in (0, 1, 2, 2, 1):
            data[number]
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path / 'a.hdr'}: values are scaled by the header's reflectance scale factor 100",
        f"{tmp_path / 'c.hdr'}: values are scaled by the header's reflectance scale factor 255",
    ]


@pytest.mark.parametrize(
    ("more", "scale", "offset"),
    [
        ("reflectance scale factor = 10000", 1e-4, 0),
        ("reflectance scale factor = 1.0", 1, 0),
        ("data gain values = {0.5, 0.25, 2}\ndata offset values = {1, 2, 3}", (0.5, 0.25, 2), (1, 2, 3)),
        ("data offset values = {1, 2, 3}", 1, (1, 2, 3)),
        ("data reflectance gain values = {0.5, 0.25, 2}", (0.5, 0.25, 2), 0),
        ("data reflectance gain values = {2, 2, 2}\ndata gain values = {3, 3, 3}", 2, 0),
        ("reflectance scale factor = 100\ndata gain values = {3, 3, 3}", 0.01, 0),
        ("data gain values = {1, 1, 1}\ndata offset values = {0, 0, 0}", 1, 0),
    ],
)
def test_declared_scales_are_applied_and_noted(tmp_path, more, scale, offset):
    counts = numbers("u2")
    cube = read_cube(write_envi(tmp_path, counts, more + "\ndata ignore value = 100"))
    scale, offset = (np.broadcast_to(factor, 3).reshape(3, 1, 1) for factor in (scale, offset))
    expected = np.where(counts == 100, 0, counts * scale + offset).astype(np.float32)
    np.testing.assert_array_equal(cube.values.numpy(), expected)
    np.testing.assert_array_equal(cube.nodata.numpy(), counts == 100)
    assert bool(cube.notes) == bool((scale != 1).any() or (offset != 0).any())


def test_a_scale_given_replaces_that_of_the_file(tmp_path):
    counts = numbers("u2")
    path = write_envi(tmp_path, counts, "reflectance scale factor = 10000")
    np.testing.assert_array_equal(read_cube(path, scale=1).values.numpy(), counts.astype(np.float32))
    np.testing.assert_array_equal(read_cube(path, scale=0.5).values.numpy(), (counts * 0.5).astype(np.float32))
    with pytest.raises(ValueError, match="scale is 0, expected a number other than 0"):
        read_cube(path, scale=0)


@pytest.mark.parametrize(
    ("dtype", "declared", "value"),
    [
        ("i2", "-9999", -9999), ("i2", "-9999.0", -9999), ("u1", "255", 255), ("f4", "nan", np.nan),
        ("f4", "-3.40282e+38", np.finfo("f4").min), ("f4", "1e20", np.float32(1e20)), ("f8", "-3.4e38", -3.4e38),
        ("u2", "-9999", None), ("u1", "0.5", None), ("i8", "-9223372036854775808", np.iinfo("i8").min),
    ],
)  # fmt: skip
def test_the_ignore_value_is_nodata(tmp_path, dtype, declared, value):
    values = numbers(dtype)
    if value is not None:
        values[1, 2, 3] = value
    cube = read_cube(write_envi(tmp_path, values, f"data ignore value = {declared}"))
    assert cube.nodata.nonzero().tolist() == ([] if value is None else [[1, 2, 3]])
    assert cube.values[1, 2, 3] == (values[1, 2, 3] if value is None else 0)


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ("wavelength units = Index\nwavelength = {1, 2, 150}", "the header's wavelengths are of unit Index"),
        ("wavelength units = Wavenumber\nwavelength = {1, 2, 150}", "the header's wavelengths are of unit Wavenumber"),
        ("wavelength = {0, 2, 150}", "the header's wavelengths are not positive"),
    ],
)
def test_wavelengths_in_no_unit_of_length_are_none_and_noted(tmp_path, more, note):
    cube = read_cube(write_envi(tmp_path, numbers("f4"), more))
    assert cube.wavelengths is None
    assert note in cube.notes[0]


def test_wavelengths_given_replace_those_of_the_file(tmp_path):
    path = write_envi(tmp_path, numbers("f4"), "wavelength = {400, 500}")
    assert read_cube(path, wavelengths=[1, 2, 3]).wavelengths.tolist() == [1, 2, 3]
    assert read_layout(path, wavelengths=[1, 2, 3]).wavelengths.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="2 wavelengths are given, the file has 3 bands"):
        read_cube(path, wavelengths=[1, 2])


def test_bytes_and_sidecars_that_the_header_does_not_describe_are_noted(tmp_path):
    path = write_envi(tmp_path, numbers("f4"))
    with (tmp_path / "a.img").open("ab") as stream:
        stream.write(bytes(9))
    (tmp_path / "a.img.aux.xml").write_text("<PAMDataset><Scale>2</Scale></PAMDataset>")
    first, second = read_cube(path).notes
    assert "a.img has 9 bytes more than its header describes" in first
    assert "a.img.aux.xml is not used" in second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("interleave = bsq", "interleave = foo"), "interleave = foo, expected bsq, bil or bip"),
        (("samples = 5", "samples = 6"), r"truncated: a\.img has 240 bytes, expected 288"),
        (("samples = 5", "samples = -5"), "samples = -5, expected a whole number >= 1"),
        (("samples = 5", "samples = 5.5"), r"samples = 5\.5, expected a whole number"),
        (("lines = 4", ""), "lacks lines"),
        (("ENVI\n", "HDR\n"), "its first line is not ENVI"),
        (("data type = 4", "data type = 6"), "complex, expected real"),
        (("data type = 4", "data type = 7"), "data type = 7, expected one of 1, 2"),
        (("byte order = 0", "byte order = 2"), "byte order = 2, expected 0 or 1"),
        (("", "file type = TIFF\n"), "file type = TIFF, expected ENVI Standard"),
        (("", "file compression = 1\n"), "compressed ENVI files are not supported"),
        (("", "major frame offsets = {0, 512}\n"), "major frame offsets, which are not supported"),
        (("", "minor frame offsets = {4, 0}\n"), "minor frame offsets, which are not supported"),
        (("", "bbl = {1, 0}\n"), "lists 2 values of 'bbl' for 3 bands"),
        (("", "bbl = {0, 0, 0}\n"), "marks all bands as bad"),
        (("", "Wavelength = {400, 500}\n"), "lists 2 wavelengths for 3 bands"),
        (("", "wavelength = {400, x, 500}\n"), "values of 'wavelength' that are not numbers"),
        (("", "wavelength = {400, 500, 600\n"), "truncated: the list of 'wavelength' does not end"),
        (("", "wavelength = {1, 2, 3}\nWAVELENGTH = {4, 5, 6}\n"), "has 'wavelength' twice"),
        (("", "data gain values = {1, 0, 1}\n"), "gain or offset values that are 0 or not finite"),
        (("", "data gain values = {1, 2}\n"), "lists 2 values of 'data gain values' for 3 bands"),
        (("", "reflectance scale factor = 0\n"), "reflectance scale factor = 0, expected a positive number"),
        (("", "data ignore value = none\n"), "values of 'data ignore value' that are not numbers"),
    ],
)
def test_a_header_that_contradicts_is_refused(tmp_path, changes, message):
    path = write_envi(tmp_path, numbers("f4"))
    old, new = changes
    text = path.read_text()
    path.write_text(text.replace(old, new, 1) if old else text + new)
    with pytest.raises(ValueError, match=message) as error:
        read_cube(path)
    assert str(path) in str(error.value)


def test_frame_offsets_of_zero_are_read(tmp_path):
    values = numbers("f4")
    path = write_envi(tmp_path, values, "major frame offsets = {0, 0}\nminor frame offsets = {0, 0}")
    assert torch.equal(read_cube(path).values, torch.from_numpy(values))

"""What HDF5 files declare is found under the names and in the places that writers use; other files are not read."""

import h5py
import numpy as np
import pytest

from mmmae.data import read_cube
from mmmae.data.readers.cube import read_layout
from mmmae.data.readers.windows import Window
from tests.data.container_files import write


@pytest.fixture
def stored():
    """Integers `[5, 18, 20]` of which the first row is -9999."""
    cube = np.random.default_rng(0).integers(1, 6000, (5, 18, 20)).astype("i2")
    cube[:, 0] = -9999
    return cube


NAMES = [
    "_FillValue",
    "missing_value",
    "NoData",
    "Data_Ignore_Value",
    "nodata_value",
    "FILL VALUE",
    "NODATA",
    "no_data",
]


VALUES = [
    -9999.0, np.int16(-9999), np.array([-9999], "f4"), "-9999", b"-9999.0", np.bytes_("-9999"),
    np.array([b"-9999"]), np.array([-1, -9999]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    list(zip(NAMES, VALUES, strict=True)),
    ids=str,
)
@pytest.mark.parametrize("place", ["cube", "group", "root"])
def test_nodata_is_declared_by_many_names_and_places(tmp_path, stored, name, value, place):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scene/image/cube"] = stored
        where = {"cube": file["scene/image/cube"], "group": file["scene"], "root": file}[place]
        where.attrs[name] = value
    cube = read_cube(tmp_path / "a.h5")
    np.testing.assert_array_equal(cube.nodata.numpy(), stored == -9999)
    np.testing.assert_array_equal(cube.values.numpy(), np.where(stored == -9999, 0, stored))


def test_the_nearest_declaration_counts(tmp_path, stored):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scene/cube"] = stored
        file.attrs["NoData"], file["scene"].attrs["NoData"] = 0, -9999
        file["scene/cube"].attrs["missing_value"] = 77
    for expected, place in ((77, "cube"), (-9999, "scene"), (0, "root")):
        cube = read_cube(tmp_path / "a.h5")
        np.testing.assert_array_equal(cube.nodata.numpy(), stored == expected)
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            if place == "cube":
                del file["scene/cube"].attrs["missing_value"]
            elif place == "scene":
                del file["scene"].attrs["NoData"]


def test_two_declared_values_are_both_nodata(tmp_path, stored):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = stored
        file["cube"].attrs["_FillValue"], file["cube"].attrs["missing_value"] = np.int16(-9999), stored[0, 1, 1]
    expected = (stored == -9999) | (stored == stored[0, 1, 1])
    np.testing.assert_array_equal(read_cube(tmp_path / "a.h5").nodata.numpy(), expected)


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".mat", "_v73.mat"])
def test_a_number_beside_the_cube_declares_nodata(tmp_path, stored, suffix):
    values = stored.transpose(1, 2, 0) if suffix.endswith("mat") else stored
    write(tmp_path / f"a{suffix}", cube=values, nodata=np.float64(-9999))
    np.testing.assert_array_equal(read_cube(tmp_path / f"a{suffix}").nodata.numpy(), stored == -9999)


@pytest.mark.parametrize("text", ["none", "", "n/a"])
def test_a_declaration_of_none_is_none(tmp_path, stored, text):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = stored
        file["cube"].attrs["NoData"] = text
    cube = read_cube(tmp_path / "a.h5")
    assert not cube.nodata.any()
    assert cube.notes == ()


def test_a_declaration_that_is_no_number_is_noted(tmp_path, stored):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = stored
        file["cube"].attrs["NoData"] = "see the manual"
    assert read_layout(tmp_path / "a.h5").notes == ("NoData is 'see the manual', no number, and not used",)


def test_the_fill_value_of_the_storage_is_nodata_if_it_was_chosen(tmp_path, stored):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("cube", stored.shape, "i2", fillvalue=-9999)[:, 1:] = stored[:, 1:]
    np.testing.assert_array_equal(read_cube(tmp_path / "a.h5").nodata.numpy(), stored == -9999)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("cube", stored.shape, "i2", fillvalue=0)[:] = np.where(stored < 0, 0, stored)
    assert not read_cube(tmp_path / "b.h5").nodata.any()  # 0 is HDF5's default, which says nothing


@pytest.mark.parametrize("suffix", [".h5", "_v73.mat"])
def test_chunks_that_were_never_written_are_nodata(tmp_path, stored, suffix):
    path = tmp_path / f"a{suffix}"
    matlab = suffix.endswith("mat")
    values = np.abs(stored)
    with h5py.File(path, "w", userblock_size=512 if matlab else 0) as file:
        data = file.create_dataset("cube", stored.shape, "i2", chunks=(2, 5, 7))
        data[:2], data[2:, 5:10] = values[:2], values[2:, 5:10]
    written = np.zeros(stored.shape, bool)
    written[:2], written[2:, 5:10] = True, True
    if matlab:
        written, values = written.transpose(0, 2, 1), values.transpose(0, 2, 1)
    cube = read_cube(path)
    np.testing.assert_array_equal(cube.nodata.numpy(), ~written)
    np.testing.assert_array_equal(cube.values.numpy(), np.where(written, values, 0))
    part = read_cube(path, window=Window(3, 4, 7, 9))
    np.testing.assert_array_equal(part.nodata.numpy(), ~written[:, 3:10, 4:13])


def test_an_array_that_was_never_written_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("cube", (3, 16, 20), "f4")
    with pytest.raises(ValueError, match="'cube' was created but never written"):
        read_cube(tmp_path / "a.h5")


@pytest.mark.parametrize("part", ["cube", "wavelengths"])
@pytest.mark.parametrize("kind", ["external", "virtual"])
@pytest.mark.parametrize("read", [read_cube, read_layout])
def test_values_in_other_files_are_not_read(tmp_path, stored, part, kind, read):
    (tmp_path / "secret.bin").write_bytes(bytes(range(1, 241)) * 40)
    shape, dtype = {"cube": ((5, 18, 20), "u1"), "wavelengths": ((5,), "f8")}[part]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"], file["wavelengths"] = stored, np.linspace(400, 900, 5)
        del file[part]
        if kind == "external":
            file.create_dataset(part, shape, dtype, external=[(str(tmp_path / "secret.bin"), 0, 4096)])
        else:
            layout = h5py.VirtualLayout(shape, dtype)
            layout[:] = h5py.VirtualSource("gone.h5", "data", shape)
            file.create_virtual_dataset(part, layout)
    with pytest.raises(ValueError, match=rf"{part}.* other files.*copy them into this one"):
        read(tmp_path / "a.h5")
    if part == "wavelengths":
        np.testing.assert_array_equal(read(tmp_path / "a.h5", wavelengths=A).wavelengths, A.astype("f4"))


def test_groups_without_end_are_refused(tmp_path, stored):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file
        for _ in range(200):
            group = group.create_group("a")
        group["cube"] = stored
    with pytest.raises(ValueError, match="more than 64 deep"):
        read_cube(tmp_path / "a.h5")


def test_links_to_other_files_are_not_followed(tmp_path, stored):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["cube"] = stored
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = h5py.ExternalLink("other.h5", "/cube")
    with pytest.raises(ValueError, match="no array"):
        read_cube(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("attributes", "scale", "offset"),
    [
        ({"scale_factor": 1e-4}, 1e-4, 0),
        ({"scale_factor": np.float32(2.0), "add_offset": -3.0}, 2, -3),
        ({"Scale_Factor": 10000.0}, 1 / 10000, 0),  # NEON divides
        ({"Scale Factor": "10000"}, 1 / 10000, 0),
        ({"Scale_Factor": 1e-4}, 1e-4, 0),
        ({"add_offset": 5.0}, 1, 5),
        ({"scale_factor": np.arange(1.0, 6)}, np.arange(1.0, 6)[:, None, None], 0),
        ({"scale_factor": 1.0, "add_offset": 0.0}, 1, 0),
        ({}, 1, 0),
    ],
)
def test_scales_and_offsets_are_applied(tmp_path, stored, attributes, scale, offset):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = stored
        file["cube"].attrs.update({"_FillValue": np.int16(-9999), **attributes})
    cube = read_cube(tmp_path / "a.h5")
    expected = np.where(stored == -9999, 0, stored * scale + offset).astype(np.float32)
    np.testing.assert_array_equal(cube.values.numpy(), expected)
    assert bool(cube.notes) == (np.any(np.asarray(scale) != 1) or offset != 0)
    raw = read_cube(tmp_path / "a.h5", scale=1.0)
    np.testing.assert_array_equal(raw.values.numpy(), np.where(stored == -9999, 0, stored))


@pytest.mark.parametrize("value", [0.0, np.nan, "big", [1.0, 2.0]])
def test_a_scale_that_means_nothing_is_refused(tmp_path, stored, value):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = stored
        file["cube"].attrs["scale_factor"] = value
    with pytest.raises(ValueError, match="'scale_factor' is"):
        read_cube(tmp_path / "a.h5")


A, B, C = (np.linspace(start, start + 100, 5) for start in (400, 600, 800))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"x/cube": 0, "x/wavelengths": A, "y/cube": 1, "y/wavelengths": B}, A),
        ({"x/cube": 0, "y/cube": 1, "y/wavelengths": B}, None),  # those of another cube
        ({"x/cube": 0, "wavelengths": A, "y/cube": 1, "y/wavelengths": B}, A),
        ({"x/cube": 0, "x/meta/spectral/Wavelength": A, "wavelengths": B}, A),
        ({"x/cube": 0, "parameters/wavelengths": A}, A),
        ({"x/cube": 0, "x/center_wavelengths_nm": A, "x/good_wavelengths": B, "x/fwhm": C}, A),
        ({"x/cube": 0, "x/cube_wavelength": A, "x/wavelength": B}, A),
        ({"x/cube": 0, "x/mask_wavelength": A}, None),
        ({"x/cube": 0, "x/wl": A / 1000, "x/bands": B}, A),
        ({"x/cube": 0, "one/wavelengths": A, "two/wavelengths": A}, A),  # a tie that does not matter
    ],
)
def test_wavelengths_are_those_of_the_nearest_group(tmp_path, stored, arrays, expected):
    write(
        tmp_path / "a.h5", **{name: stored + value if name[-4:] == "cube" else value for name, value in arrays.items()}
    )
    found = read_cube(tmp_path / "a.h5", dataset="x/cube").wavelengths
    if expected is None:
        assert found is None
    else:
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_wavelengths_that_two_vectors_could_be_are_refused(tmp_path, stored):
    write(tmp_path / "a.h5", **{"x/cube": stored, "one/wavelengths": A, "two/wavelengths": B})
    with pytest.raises(ValueError, match=r"'one/wavelengths' and 'two/wavelengths' could both be.*--wavelengths"):
        read_cube(tmp_path / "a.h5")
    np.testing.assert_array_equal(read_cube(tmp_path / "a.h5", wavelengths=A).wavelengths, A.astype("f4"))


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        (A / 1000, "micrometers", A), (A / 1000, None, A), (A, "nm", A), (A * 10, "Angstroms", A),
        (np.arange(5.0) + 1, "Index", None), (A, "cm-1", None), (A * 0, "nm", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["units", "Units", "unit"])
@pytest.mark.parametrize("where", ["array", "attribute"])
def test_units_of_wavelengths(tmp_path, stored, values, unit, expected, key, where):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = stored
        if where == "array":
            file["wavelengths"] = values
        else:
            file["cube"].attrs["wavelengths"] = values
        if unit is not None:
            name, place = (key, file["wavelengths"]) if where == "array" else (f"wavelength_{key}", file["cube"])
            place.attrs[name] = unit
    found = read_cube(tmp_path / "a.h5").wavelengths
    if expected is None:
        assert found is None
        assert "not used" in read_layout(tmp_path / "a.h5").notes[0]
    else:
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("place", ["group", "root", "beside"])
def test_a_fill_value_of_the_storage_hides_no_other_declaration(tmp_path, stored, place):
    values = stored.astype("f4")
    values[:, 1] = np.nan
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("scene/cube", data=values, fillvalue=np.nan)
        if place == "beside":
            file["nodata"] = -9999.0
        else:
            (file["scene"] if place == "group" else file).attrs["NoData"] = -9999.0
    nodata = read_cube(tmp_path / "a.h5").nodata.numpy()
    assert nodata[:, :2].all()
    np.testing.assert_array_equal(nodata, np.isnan(values) | (stored == -9999))


def test_the_scale_of_the_nearest_group_counts(tmp_path, stored):
    stored = np.abs(stored)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scene/cube"] = stored
        file["scene"].attrs["Scale_Factor"], file.attrs["scale_factor"] = 100.0, 7.0
    cube = read_cube(tmp_path / "a.h5")
    np.testing.assert_array_equal(cube.values.numpy(), (stored * (1 / 100)).astype("f4"))
    assert cube.notes == ("values are divided by 100 (Scale_Factor)",)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["scene/cube"].attrs["add_offset"] = 3.0
    np.testing.assert_array_equal(read_cube(tmp_path / "a.h5").values.numpy(), stored + 3)


def test_a_scale_of_a_group_that_does_not_fit_is_noted(tmp_path, stored):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = stored
        file.attrs["scale_factor"] = [1.0, 2.0, 3.0]
    cube = read_cube(tmp_path / "a.h5")
    np.testing.assert_array_equal(cube.values.numpy(), stored)
    assert "'scale_factor' is '[1. 2. 3.]'" in cube.notes[0]


@pytest.mark.parametrize("names", [("scale_factor", "Scale_Factor"), ("Scale_Factor", "scale_factor")])
def test_of_two_spellings_that_of_the_conventions_counts(tmp_path, stored, names):
    with h5py.File(tmp_path / "a.h5", "w", track_order=True) as file:
        cube = file.create_dataset("cube", data=stored, track_order=True)
        for name in names:
            cube.attrs[name] = {"scale_factor": 0.5, "Scale_Factor": 1000.0}[name]
    cube = read_cube(tmp_path / "a.h5")
    np.testing.assert_array_equal(cube.values.numpy(), stored * 0.5)
    assert cube.notes == ("values are multiplied by 0.5 (scale_factor)",)


@pytest.mark.parametrize(
    ("attributes", "low", "high"),
    [
        ({"valid_range": np.int16([0, 3000])}, 0, 3000),
        ({"valid_min": np.int16(0)}, 0, np.inf),
        ({"valid_max": np.int16(3000)}, -np.inf, 3000),
        ({"valid_range": [0.0, 0.3], "scale_factor": 1e-4}, -np.inf, np.inf),  # in measured units: not used
        ({"valid_range": "0 to 3000"}, -np.inf, np.inf),
    ],
)
def test_values_beyond_the_valid_range_are_nodata(tmp_path, stored, attributes, low, high):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = stored
        file["cube"].attrs.update(attributes)
    cube = read_cube(tmp_path / "a.h5", scale=1.0)
    beyond = (stored < low) | (stored > high)
    np.testing.assert_array_equal(cube.nodata.numpy(), beyond)
    np.testing.assert_array_equal(cube.values.numpy(), np.where(beyond, 0, stored))
    assert any(next(iter(attributes)) in note for note in cube.notes)


def test_a_valid_range_without_sign_is_that_of_values_without_sign(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = np.arange(-100, 20, dtype="i1").reshape(3, 5, 8)
        file["cube"].attrs.update({"_Unsigned": "true", "valid_range": np.int8([10, -56])})  # 10 to 200
    cube = read_cube(tmp_path / "a.h5")
    meant = np.arange(-100, 20).reshape(3, 5, 8) % 256
    np.testing.assert_array_equal(cube.nodata.numpy(), (meant < 10) | (meant > 200))


@pytest.mark.parametrize(
    ("name", "value", "noted"),
    [
        ("scale", 1e-4, "scale="), ("gain", 2.0, "scale="), ("offset", 5.0, "scale="), ("mask_value", 7, "nodata="),
        ("null_value", 7, "nodata="), ("scale", 1.0, None), ("offset", 0.0, None),
    ],
)  # fmt: skip
def test_attributes_that_could_be_meant_for_the_values_are_noted(tmp_path, stored, name, value, noted):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = stored
        file["cube"].attrs[name] = value
    notes = read_cube(tmp_path / "a.h5").notes
    assert len(notes) == (noted is not None)
    assert noted is None or (f"{name} is" in notes[0] and noted in notes[0])


@pytest.mark.parametrize("where", ["array", "attribute"])
def test_wavelengths_that_are_texts_are_noted(tmp_path, stored, where):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["cube"] = stored
        if where == "array":
            file["wavelengths"] = [b"450", b"500", b"550", b"600", b"650"]
        else:
            file["cube"].attrs["wavelengths"] = ["450 nm", "500 nm", "550 nm", "600 nm", "650 nm"]
    cube = read_cube(tmp_path / "a.h5")
    assert cube.wavelengths is None
    assert "wavelengths holds no numbers and is not used" in cube.notes[0]


def test_wavelengths_in_a_cell_of_matlab_are_noted(tmp_path, stored):
    import scipy.io

    cells = np.array(["450 nm", "500 nm", "550 nm", "600 nm", "650 nm"], dtype=object)
    scipy.io.savemat(tmp_path / "a.mat", {"cube": stored.transpose(1, 2, 0), "wavelengths": cells})
    assert "wavelengths holds no numbers" in read_cube(tmp_path / "a.mat").notes[0]

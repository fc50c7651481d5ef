"""Phantom files are read back as written, and their labels fit the drawn structures."""

import csv

import numpy as np
import pytest

from mmmae.cli import main
from mmmae.data import PairedFolder, read_cube
from mmmae.phantom import Phantom, write_phantom

AUX = ("ir", "af", "thickness")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "files"
    assert main(["data", "phantom", str(folder), "--subjects", "6", "--size", "48", "--missing", "0.3"]) == 0
    return folder


def test_the_files_are_subjects_of_the_phantom(folder):
    data, phantom = PairedFolder(folder / "hsi", {name: folder / name for name in AUX}), Phantom(6, 48, missing=0.3)
    assert data.names == phantom.names
    assert data.wavelengths.tolist() == phantom.wavelengths.tolist()
    for ours, theirs in zip(data, phantom, strict=True):
        assert ours.valid.equal(theirs.valid)
        assert ours.aux.keys() == theirs.aux.keys()
        reflectance = phantom.normalization.invert("hsi", theirs.hsi[0])[:, theirs.valid]
        read = data.normalization.invert("hsi", ours.hsi[0])[:, ours.valid]
        np.testing.assert_allclose(read, reflectance, atol=1e-5)
    assert {len(sample.aux) for sample in data} != {3}


def test_masks_show_what_the_cube_shows(folder):
    for path in sorted((folder / "labels").iterdir()):
        mask, cube = np.load(path), read_cube(folder / "hsi" / f"{path.stem}.npz")
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1, 2, 255}
        np.testing.assert_array_equal(mask == 255, cube.nodata[0])
        green = cube.values[int((cube.wavelengths - 575).abs().argmin())].numpy()
        assert green[mask == 1].mean() < green[mask == 0].mean() < green[mask == 2].mean()


def test_a_class_is_the_side_of_the_disc(folder):
    with (folder / "classes.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == sorted(path.stem for path in (folder / "hsi").iterdir())
    assert {row["label"] for row in rows} == {"left", "right"}
    for row in rows:
        columns = np.nonzero(np.load(folder / "labels" / f"{row['name']}.npy") == 2)[1]
        assert row["label"] == ("right" if columns.mean() > 23.5 else "left")


def test_a_folder_with_something_in_it_and_bad_numbers_are_refused(folder, tmp_path, capsys):
    before = sorted(folder.rglob("*"))
    assert main(["data", "phantom", str(folder)]) == 2
    assert "is not empty, expected a new or empty folder" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    for option, value, expected in (
        ("--subjects", "0", "a whole number >= 1"),
        ("--size", "0", "a whole number >= 1"),
        ("--bands", "0", "a whole number >= 1"),
        ("--seed", "-1", "a whole number >= 0"),
        ("--missing", "2", "a number in [0, 1]"),
    ):
        assert main(["data", "phantom", str(tmp_path / "new"), option, value]) == 2
        assert f"{option} is {value}, expected {expected}\n" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_seed_decides(tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        write_phantom(tmp_path / name, subjects=1, image_size=16, bands=3, seed=seed)
    one, two, three = (np.load(next((tmp_path / name / "hsi").iterdir()))["cube"] for name in ("one", "two", "three"))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, three, equal_nan=True)

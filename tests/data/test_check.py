"""`mmmae data check` finds every kind of damage in a folder, and no other."""

import json

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from mmmae.cli import main
from mmmae.data import PairedFolder, check, strips, write_cache, write_shards
from mmmae.data.check import Kind, check_files
from mmmae.phantom import write_phantom

NM = np.arange(450, 750, 100.0)


@pytest.fixture
def tree(tmp_path, write_raster):
    """Six intact subjects s0 to s5 of 3 bands 16 x 20, with images of half the size."""
    rng = np.random.default_rng(0)
    (tmp_path / "hsi").mkdir()
    (tmp_path / "ir").mkdir()
    for index in range(6):
        write(write_raster, tmp_path / "hsi" / f"s{index}.tif", rng.normal(100, 10, (3, 16, 20)))
        np.save(tmp_path / "ir" / f"s{index}.npy", rng.normal(5, 2, (8, 10)).astype(np.float32))
    return tmp_path


def write(write_raster, path, values, nm=NM):
    return write_raster(path, values.astype(np.float32), nodata=-1, descriptions=[f"{value} nm" for value in nm])


def found(tree, **aux):
    _, findings = check_files(tree / "hsi", aux or {"ir": tree / "ir"})
    return sorted((finding.kind.value, finding.path.name) for finding in findings)


def test_whole_files_give_no_finding(tree):
    assert check_files(tree / "hsi", {"ir": tree / "ir"}) == (12, [])


@pytest.mark.parametrize("target", ["../elsewhere/s6.tif", "s6.tif"], ids=["gone", "loop"])
def test_a_broken_link_is_a_subject_that_is_missing(tree, target):
    (tree / "hsi" / "s6.tif").symlink_to(target)
    (tree / "ir" / "s6.npy").symlink_to("s0.npy")
    assert ("unreadable", "s6.tif") in found(tree)
    with pytest.raises(ValueError, match=rf"subject 's6': .*s6.tif is a link to {target}, which leads to no file"):
        PairedFolder(tree / "hsi")


def test_one_cube_is_checked_with_its_images_alone(tree, capsys):
    np.save(tree / "ir" / "s7.npy", np.zeros((8, 10)))  # damage of another subject
    assert check_files(tree / "hsi" / "s2.tif", {"ir": tree / "ir"}) == (2, [])
    assert main(["data", "check", str(tree / "hsi" / "s2.tif")]) == 0
    assert capsys.readouterr().out == "read 1: no damage\n"


def damage_everything(tree, write_raster):
    """Damage files in thirteen ways, one file each."""
    hsi, rng = tree / "hsi", np.random.default_rng(1)

    def cube(name, bands=3, nm=NM):
        return write(write_raster, hsi / name, rng.normal(100, 10, (bands, 16, 20)), nm)

    for name in ("truncated", "nan", "nodata", "band", "constant", "bands", "wavelengths", "undeclared"):
        np.save(tree / "ir" / f"{name}.npy", rng.normal(size=(8, 10)))
    path = cube("truncated.tif")
    path.write_bytes(path.read_bytes()[:-500])
    (tree / "ir" / "s0.npy").write_bytes(b"")
    broken = rng.normal(100, 10, (3, 16, 20))
    broken[1, 2, 3] = np.nan
    write(write_raster, hsi / "nan.tif", broken)
    write(write_raster, hsi / "nodata.tif", np.full((3, 16, 20), -1))
    broken = rng.normal(100, 10, (3, 16, 20))
    broken[1] = -1
    write(write_raster, hsi / "band.tif", broken)
    broken = rng.normal(100, 10, (3, 16, 20))
    broken[2] = 7
    write(write_raster, hsi / "constant.tif", broken)
    broken = rng.normal(100, 10, (3, 16, 20))
    broken[:, :5] = -9999
    write(write_raster, hsi / "undeclared.tif", broken)
    cube("bands.tif", 4, [*NM, 800])
    cube("wavelengths.tif", nm=NM + 40)
    np.save(tree / "ir" / "s1.npy", rng.normal(size=(10, 8)))  # rows and columns exchanged
    (tree / "ir" / "s3.npy").write_bytes((tree / "ir" / "s2.npy").read_bytes())
    np.save(tree / "ir" / "orphan.npy", rng.normal(size=(8, 10)))
    np.savez(tree / "ir" / "s4.npz", rng.normal(size=(8, 10)))
    return [
        ("band.tif", "nodata-band"),
        ("bands.tif", "bands"),
        ("constant.tif", "constant"),
        ("nan.tif", "not-finite"),
        ("nodata.tif", "nodata"),
        ("orphan.npy", "orphan"),
        ("s0.npy", "empty"),
        ("s1.npy", "misaligned"),
        ("s3.npy", "duplicate"),
        ("s4.npz", "same-stem"),
        ("truncated.tif", "unreadable"),
        ("undeclared.tif", "undeclared-nodata"),
        ("wavelengths.tif", "wavelengths"),
    ]


def test_thirteen_kinds_of_damage_are_found_and_no_other(tree, write_raster):
    expected = damage_everything(tree, write_raster)
    assert found(tree) == sorted((kind, name) for name, kind in expected)
    assert {kind for _, kind in expected} == {kind.value for kind in Kind if kind.is_damage}


def test_the_command_lists_them_and_fails(tree, write_raster, capsys):
    expected = damage_everything(tree, write_raster)
    assert main(["data", "check", str(tree), "--json"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert sorted((row["path"].rsplit("/", 1)[1], row["kind"]) for row in report["findings"]) == expected
    assert all(row["damage"] and row["subject"] and row["reason"] for row in report["findings"])
    assert "read 30/30" in printed.err
    assert main(["data", "check", str(tree / "ir")]) == 1  # as a folder of cubes
    capsys.readouterr()
    assert main(["data", "check", "--hsi", str(tree / "hsi"), "--aux", f"ir={tree / 'ir'}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "read 30: 13 findings of 13 kinds of damage"
    assert len(lines) == 14
    assert sum("nan.tif: " in line and "1 in band 1" in line for line in lines) == 1


def test_one_finding_is_counted_in_the_singular(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((3, 16, 20)))
    (tmp_path / "b.npy").touch()
    assert main(["data", "check", "--hsi", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "read 2: 1 finding of 1 kind of damage"


@pytest.mark.parametrize("kind", ["hsi", "ir"])
def test_each_file_is_damaged_in_either_folder(tree, kind):
    """An empty file, a constant one, and one that is no image."""
    np.save(tree / kind / "s0.npy", np.full((3, 16, 20), 4.0))
    (tree / kind / "s2.npy").write_bytes(b"")
    (tree / kind / "s3.npy").write_bytes(b"no array")
    if kind == "hsi":
        for index in (0, 2, 3):
            (tree / kind / f"s{index}.tif").unlink()
    else:
        np.save(tree / kind / "s0.npy", np.full((8, 10), 4.0))
    without_wavelengths = [("wavelengths", "s0.npy")] if kind == "hsi" else []
    expected = [("constant", "s0.npy"), ("empty", "s2.npy"), ("unreadable", "s3.npy"), *without_wavelengths]
    assert found(tree) == expected


def test_a_band_that_no_file_has_and_a_cube_alone_are_information(tree, write_raster, capsys):
    rng = np.random.default_rng(1)
    for index in range(6):
        values = rng.normal(100, 10, (3, 16, 20))
        values[1] = -1
        write(write_raster, tree / "hsi" / f"s{index}.tif", values)
    (tree / "ir" / "s5.npy").unlink()
    assert found(tree) == [("no-auxiliary", "s5.tif"), ("unused-band", "hsi")]
    assert main(["data", "check", str(tree)]) == 0
    assert "read 11: no damage" in capsys.readouterr().out


def test_a_damaged_first_file_is_found_and_not_all_the_others(tree, write_raster):
    write(write_raster, tree / "hsi" / "s0.tif", np.random.default_rng(1).normal(size=(2, 16, 20)), NM[:2])
    assert found(tree) == [("bands", "s0.tif")]
    write(write_raster, tree / "hsi" / "s0.tif", np.random.default_rng(1).normal(size=(3, 16, 20)), NM + 99)
    assert found(tree) == [("wavelengths", "s0.tif")]


def test_modalities_of_one_folder_are_read_once(tree, write_raster):
    (tree / "radar").mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        values = rng.normal(size=(3, 8, 10))
        values[2] = 0  # which no modality takes
        np.save(tree / "radar" / f"s{index}.npy", values if index else values[:1])
    count, findings = check_files(tree / "hsi", {"vv": f"{tree}/radar:0", "vh": f"{tree}/radar:1"})
    assert count == 12
    (finding,) = findings
    assert (finding.kind, finding.modality, finding.path.name) == (Kind.BANDS, "vv, vh", "s0.npy")
    assert "no band 1" in finding.reason


@pytest.mark.parametrize(("size", "kinds"), [((9, 10), []), ((8, 11), []), ((10, 10), ["misaligned"])])
def test_an_aspect_ratio_may_differ_by_rounding(tree, size, kinds):
    np.save(tree / "ir" / "s1.npy", np.random.default_rng(1).normal(size=size))
    assert [kind for kind, _ in found(tree)] == kinds


def test_large_files_are_read_in_strips(tree, write_raster, monkeypatch):
    expected = damage_everything(tree, write_raster)
    monkeypatch.setattr(strips, "VALUES_AT_ONCE", 3 * 20 * 3)  # three rows of the cubes
    sizes = []
    read = check.read_cube
    monkeypatch.setattr(
        check, "read_cube", lambda path, **options: (cube := read(path, **options), sizes.append(cube))[0]
    )
    assert found(tree) == sorted((kind, name) for name, kind in expected)
    assert max(cube.values.numel() for cube in sizes) <= 3 * 20 * 3


def test_a_folder_that_is_not_there_is_bad_usage(tree, capsys):
    (tree / "empty").mkdir()
    for arguments, message in (
        ([str(tree / "none")], "none does not exist"),
        ([], "expected one of DIR, --hsi, --cache and --shards"),
        ([str(tree), "--hsi", str(tree / "hsi")], "expected one of DIR, --hsi, --cache and --shards"),
        ([str(tree), "--aux", f"ir={tree / 'ir'}"], "--aux needs --hsi"),
        (["--hsi", str(tree / "hsi"), "--aux", f"ir={tree / 'none'}"], "does not exist"),
        (["--hsi", str(tree / "hsi"), "--aux", f"hsi={tree / 'hsi'}"], '"hsi" is the name of the cubes'),
        ([str(tree / "empty")], f"{tree / 'empty' / 'hsi'} is not there: name the folder of cubes with --hsi"),
    ):
        assert main(["data", "check", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_damaged_cache_is_listed(tmp_path, capsys):
    write_phantom(tmp_path / "files", subjects=3, image_size=16)
    folder = write_cache(PairedFolder(tmp_path / "files" / "hsi"), tmp_path / "cache")
    assert main(["data", "check", "--cache", str(folder)]) == 0
    path = folder / "0000" / "0000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert main(["data", "check", "--cache", str(folder), "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["findings"]
    assert row["kind"] == "unreadable"
    assert row["path"] == str(path)
    assert "is damaged" in row["reason"]


@pytest.mark.parametrize("damage", ["truncated", "missing"])
@pytest.mark.parametrize(("option", "write"), [("--cache", write_cache), ("--shards", write_shards)])
def test_a_stored_file_that_is_truncated_or_missing_is_a_finding(tmp_path, capsys, option, write, damage):
    write_phantom(tmp_path / "files", subjects=3, image_size=16)
    folder = write(PairedFolder(tmp_path / "files" / "hsi"), tmp_path / "stored")
    path = max(folder.rglob("*.[st]a[fr]*"))
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    assert main(["data", "check", option, str(folder), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["findings"]
    assert {row["path"] for row in rows} == {str(path)}
    assert len(rows) == (1 if option == "--cache" else 3)
    assert all("missing" in row["reason"] or damage == "truncated" for row in rows)


def test_cubes_of_several_sizes_are_information_and_one_without_wavelengths_is_damage(tree, capsys):
    rng = np.random.default_rng(1)
    (tree / "hsi" / "s1.tif").unlink()
    np.savez(tree / "hsi" / "s1.npz", cube=rng.normal(100, 10, (3, 32, 40)), wavelengths=NM)
    assert found(tree) == [("sizes", "hsi")]
    assert main(["data", "check", str(tree)]) == 0
    assert "cubes of 2 sizes, 5 of 16 x 20, 1 of 32 x 40" in capsys.readouterr().out
    np.savez(tree / "hsi" / "s1.npz", cube=rng.normal(100, 10, (3, 16, 20)))
    assert found(tree) == [("wavelengths", "s1.npz")]


def test_the_phantom_gives_no_finding(tmp_path):
    write_phantom(tmp_path, subjects=4, image_size=32, missing=0.0)
    assert check_files(tmp_path / "hsi", {name: tmp_path / name for name in ("ir", "af", "thickness")}) == (16, [])


def test_the_real_scenes_give_no_finding(scenes):
    aux = {"VV": f"{scenes}/S1RTC:0", "VH": f"{scenes}/S1RTC:1", "DEM": scenes / "DEM"}
    assert check_files(scenes / "S2L2A", aux) == (15, [])


def test_hidden_folders_and_folders_without_an_image_do_not_end_the_check(tree, capsys):
    for name in (".cache", "splits"):
        (tree / name).mkdir()
        (tree / name / "train.txt").write_text("s0")
    assert main(["data", "check", str(tree), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == 12
    (row,) = report["findings"]
    assert (row["kind"], row["modality"], row["path"]) == ("note", "splits", str(tree / "splits"))
    assert "holds no image" in row["reason"]


def test_the_name_of_a_folder_forges_no_line(tree, capsys):
    folder = tree / "x\nread 9: no damage"
    folder.mkdir()
    (folder / "s0.npy").write_bytes(b"")
    assert main(["data", "check", str(tree)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("read ")] == lines[-1:]


def windows_read(monkeypatch, path):
    """Check a folder of one cube in strips of three rows; return the windows that are read."""
    windows, read = [], check.read_cube

    def reading(path, window=None, **options):
        windows.append(window)
        return read(path, window=window, **options)

    monkeypatch.setattr(check, "read_cube", reading)
    monkeypatch.setattr(strips, "VALUES_AT_ONCE", 3 * 20 * 3)
    assert check_files(path.parent)[1] == []
    return windows


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".png"])
def test_what_is_decoded_as_a_whole_is_read_once(tmp_path, monkeypatch, suffix):
    path, rng = tmp_path / f"a{suffix}", np.random.default_rng(0)
    if suffix == ".npz":
        np.savez_compressed(path, cube=rng.normal(size=(3, 16, 20)))
    elif suffix == ".mat":
        scipy.io.savemat(path, {"cube": rng.normal(size=(16, 20, 3))}, do_compression=True)
    else:
        Image.fromarray(rng.integers(1, 255, (16, 20, 3), dtype=np.uint8)).save(path)
    assert windows_read(monkeypatch, path) == [None]


@pytest.mark.parametrize(
    ("chunks", "rows"),
    [((3, 4, 20), [0, 4, 8, 12]), ((1, 2, 5), [0, 2, 4, 6, 8, 10, 12, 14]), ((3, 16, 20), [0, 3, 6, 9, 12, 15])],
    ids=["larger than a strip", "smaller", "too large"],
)
def test_strips_do_not_cut_chunks_unless_these_are_too_large(tmp_path, monkeypatch, chunks, rows):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("cube", data=np.random.default_rng(0).normal(size=(3, 16, 20)), chunks=chunks)
    assert [window.row for window in windows_read(monkeypatch, tmp_path / "a.h5")] == rows


def test_the_check_takes_a_file_of_wavelengths_only_and_says_so(tree, capsys):
    assert main(["data", "check", "--hsi", str(tree / "hsi"), "--wavelengths", "550,650"]) == 2
    assert "--wavelengths is 550,650, expected a file with those of all bands" in capsys.readouterr().err

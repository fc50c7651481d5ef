"""Files are paired by stem; a missing image is absent from the sample, and a wrong file is an error with its name."""

import multiprocessing
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mmmae.data import Normalization, PairedFolder, collate, image_files, read_cube

IDENTITY = Normalization({"hsi": ((-1.0, 0.0, 1.0),) * 3, "ir": ((-1.0, 0.0, 1.0),)})


@pytest.fixture
def tree(tmp_path, write_raster):
    """Four subjects s0 to s3 of 3 bands 8 x 10; ir (2 bands, .npy, 4 x 5) of all but s1."""
    rng = np.random.default_rng(0)
    (tmp_path / "hsi").mkdir()
    (tmp_path / "ir").mkdir()
    for index in range(4):
        cube = rng.normal(100, 10, (3, 8, 10)).astype(np.float32)
        write_raster(tmp_path / "hsi" / f"s{index}.tif", cube, nodata=-1)
        if index != 1:
            np.save(tmp_path / "ir" / f"s{index}.npy", rng.normal(5, 2, (2, 4, 5)).astype(np.float32))
    return tmp_path


def test_files_are_paired_by_stem_whatever_their_suffix(tree):
    data = PairedFolder(tree / "hsi", {"ir": tree / "ir"})
    assert data.names == ["s0", "s1", "s2", "s3"]
    assert len(data) == 4
    assert data.modalities == {"ir": 2}
    assert data.bands == 3
    assert data.wavelengths is None
    sample = data[2]
    assert sample.name == "s2"
    assert sample.hsi.shape == (1, 3, 8, 10)
    assert sample.valid.shape == (8, 10)
    assert sample.valid.all()
    assert sample.aux["ir"].shape == (2, 4, 5)
    raw = torch.from_numpy(np.load(tree / "ir" / "s2.npy"))
    torch.testing.assert_close(data.normalization.invert("ir", sample.aux["ir"]), raw)
    torch.testing.assert_close(
        data.normalization.invert("hsi", sample.hsi[0]), read_cube(tree / "hsi" / "s2.tif").values
    )


def test_a_missing_auxiliary_file_is_absent(tree):
    data = PairedFolder(tree / "hsi", {"ir": tree / "ir"})
    assert data[1].aux == {}
    batch = collate([data[0], data[1]], data.modalities)
    assert batch.present["ir"].tolist() == [True, False]


def test_an_auxiliary_file_of_nothing_but_nodata_is_absent(tree, write_raster):
    (tree / "ir" / "s0.npy").unlink()
    write_raster(tree / "ir" / "s0.tif", np.full((2, 4, 5), -1, np.float32), nodata=-1)
    data = PairedFolder(tree / "hsi", {"ir": tree / "ir"})
    assert data[0].aux == {}


def test_a_suffix_of_the_folder_chooses_bands(tree):
    data = PairedFolder(
        str(tree / "hsi"), {"one": f"{tree / 'ir'}:1", "both": f"{tree / 'ir'}:1,0"}, normalization=None
    )
    assert data.modalities == {"one": 1, "both": 2}
    sample = data[0]
    torch.testing.assert_close(sample.aux["one"][0], sample.aux["both"][0])
    raw = torch.from_numpy(np.load(tree / "ir" / "s0.npy"))
    torch.testing.assert_close(data.normalization.invert("both", sample.aux["both"]), raw[[1, 0]])
    with pytest.raises(ValueError, match=r"modality 'ir', subject 's0': .*s0\.npy: no band 2: .* bands 0 to 1"):
        PairedFolder(tree / "hsi", {"ir": f"{tree / 'ir'}:2"})


def test_a_folder_whose_name_ends_like_a_band_is_a_folder(tree):
    (tree / "ir").rename(tree / "ir:0")
    assert PairedFolder(tree / "hsi", {"ir": tree / "ir:0"}).modalities == {"ir": 2}


def test_bands_or_wavelengths_choose_of_the_cubes(tree, write_raster):
    data = PairedFolder(tree / "hsi", bands=[2, 0])
    assert data.bands == 2
    raw = read_cube(tree / "hsi" / "s0.tif").values
    torch.testing.assert_close(data.normalization.invert("hsi", data[0].hsi[0]), raw[[2, 0]])
    (tree / "spectral").mkdir()
    rng = np.random.default_rng(1)
    for name, nm in (("a", [450, 550, 650]), ("b", [455, 553, 646])):
        write_raster(
            tree / "spectral" / f"{name}.tif",
            rng.normal(size=(3, 4, 4)).astype(np.float32),
            descriptions=[f"{value} nm" for value in nm],
        )
    data = PairedFolder(tree / "spectral", wavelengths=[650, 450], tolerance=6)
    assert data.wavelengths.tolist() == [650, 450]
    assert data[1].hsi.shape == (1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"subject 'a'.*a\.tif: no band within 6 nm of 700 nm"):
        PairedFolder(tree / "spectral", wavelengths=[700], tolerance=6)
    with pytest.raises(ValueError, match="expected only one of bands="):
        PairedFolder(tree / "spectral", wavelengths=[700], bands=[0])


def test_cubes_of_other_wavelengths_are_refused(tree, write_raster):
    (tree / "spectral").mkdir()
    for name, nm in (("a", [450, 550, 650]), ("b", [650, 550, 450])):
        image = np.random.default_rng(1).normal(size=(3, 4, 4)).astype(np.float32)
        write_raster(tree / "spectral" / f"{name}.tif", image, descriptions=[f"{value} nm" for value in nm])
    data = PairedFolder(tree / "spectral")
    with pytest.raises(ValueError, match=r"wavelengths of .*b\.tif and .*a\.tif differ by up to 200 nm"):
        data[1]


def test_side_cars_hidden_files_and_folders_are_ignored(tree):
    for name in ("s0.tif.aux.xml", "s0.tfw", "s0.tif.ovr", "s0.json", "s0.txt", "README.md", ".s0.tif", "Thumbs.db"):
        (tree / "hsi" / name).write_text("x")
    (tree / "hsi" / "more.tif").mkdir()
    assert PairedFolder(tree / "hsi").names == ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize("header", ["s9.hdr", "s9.img.hdr"])
def test_an_envi_pair_is_one_file(tmp_path, write_raster, header):
    (tmp_path / "hsi").mkdir()
    write_raster(tmp_path / "hsi" / "s9.img", np.ones((3, 4, 4), np.float32))
    (tmp_path / "hsi" / "s9.hdr").rename(tmp_path / "hsi" / header)
    data = PairedFolder(tmp_path / "hsi")
    assert data.names == ["s9"]
    assert data[0].hsi.abs().max() == 0  # a constant band


def test_two_files_of_one_stem_are_refused(tree):
    np.save(tree / "hsi" / "s2.npy", np.zeros((3, 8, 10)))
    with pytest.raises(ValueError, match=r"modality 'hsi', subject 's2': two files, .*s2\.npy and .*s2\.tif"):
        PairedFolder(tree / "hsi")


@pytest.mark.parametrize("modality", ["hsi", "ir"])
def test_an_unknown_or_empty_folder_is_refused_at_construction(tree, modality):
    (tree / "empty").mkdir()
    (tree / "empty" / "notes.txt").write_text("x")
    for name, message in (("none", "does not exist"), ("empty", "no image in"), ("empty/notes.txt", "is a file")):
        folders = {"hsi": tree / "hsi", "ir": tree / "ir", modality: tree / name}
        with pytest.raises(ValueError, match=rf"modality '{modality}': .*{message}"):
            PairedFolder(folders["hsi"], {"ir": folders["ir"]})


def test_one_file_is_a_data_set_of_one_subject(tree, write_cube, values):
    subjects = PairedFolder(tree / "hsi" / "s2.tif", {"ir": tree / "ir"})
    assert subjects.names == ["s2"]
    assert sorted(subjects[0].aux) == ["ir"]
    with pytest.raises(ValueError, match=r"modality 'ir': .*s0\.npy is a file"):
        PairedFolder(tree / "hsi", {"ir": tree / "ir" / "s0.npy"})
    pair = write_cube(tree / "alone.img", values)
    for path in (pair, pair.with_suffix(".hdr")):
        assert PairedFolder(path).names == ["alone"]
        assert repr(PairedFolder(path)).startswith(f"PairedFolder({path}: 1 subject, ")


def test_auxiliary_files_without_a_subject_give_one_warning(tree):
    for index in (7, 8):
        np.save(tree / "ir" / f"s{index}.npy", np.zeros((2, 4, 5)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = PairedFolder(tree / "hsi", {"ir": tree / "ir"})
    assert len(caught) == 1
    assert "2 auxiliary files have no hyperspectral file" in str(caught[0].message)
    assert "s7.npy" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert len(data) == 4


def test_a_modality_that_no_subject_has_is_refused(tree):
    (tree / "af").mkdir()
    np.save(tree / "af" / "other.npy", np.zeros((1, 4, 5)))
    with pytest.raises(ValueError, match=r"modality 'af': no file in .* has the stem .*other\.npy and s0\.tif"):
        PairedFolder(tree / "hsi", {"af": tree / "af"})


def test_the_name_hsi_is_taken(tree):
    with pytest.raises(ValueError, match="name of the cubes"):
        PairedFolder(tree / "hsi", {"hsi": tree / "ir"})


@pytest.mark.parametrize("modality", ["hsi", "ir"])
def test_an_unreadable_file_is_refused_with_modality_subject_and_path(tree, modality):
    data = PairedFolder(tree / "hsi", {"ir": f"{tree / 'ir'}:0"}, normalization=IDENTITY)
    path = tree / modality / f"s2{'.tif' if modality == 'hsi' else '.npy'}"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"modality '{modality}', subject 's2': .*cannot be read") as error:
        data[2]
    assert str(error.value).count(str(path)) == 1


def test_a_subject_with_another_number_of_bands_is_refused(tree, write_raster):
    write_raster(tree / "hsi" / "s3.tif", np.ones((4, 8, 10), np.float32))
    data = PairedFolder(tree / "hsi", normalization=Normalization({"hsi": ((-1.0, 0.0, 1.0),) * 3}))
    with pytest.raises(ValueError, match=r"subject 's3': .*s3\.tif has 4 bands, .*s0\.tif has 3"):
        data[3]


def test_sizes_that_differ_are_refused_without_an_image_size(tree, write_raster):
    write_raster(tree / "hsi" / "s3.tif", np.ones((3, 8, 11), np.float32))
    with pytest.raises(ValueError, match=r"subject 's3': .*s3\.tif is 8 x 11, .*s0\.tif is 8 x 10; give an image_size"):
        PairedFolder(tree / "hsi").normalization  # noqa: B018
    assert PairedFolder(tree / "hsi", image_size=(5, 6))[3].hsi.shape == (1, 3, 5, 6)


@pytest.mark.parametrize(("image_size", "expected"), [(16, (16, 16)), ((6, 20), (6, 20)), ((8, 10), (8, 10))])
def test_images_are_registered_bilinearly_to_the_image_size(tree, image_size, expected):
    data = PairedFolder(tree / "hsi", {"ir": f"{tree / 'ir'}:0"}, image_size=image_size, normalization=IDENTITY)
    sample = data[0]
    raw = read_cube(tree / "hsi" / "s0.tif").values
    resized = F.interpolate(raw[None], expected, mode="bilinear", align_corners=False)
    torch.testing.assert_close(sample.hsi, resized)
    assert sample.valid.shape == expected
    assert sample.aux["ir"].shape == (1, *expected)


@pytest.mark.parametrize("image_size", [0, (4, 0), -3])
def test_an_image_size_that_is_not_positive_is_refused(tree, image_size):
    with pytest.raises(ValueError, match="expected one or two positive numbers"):
        PairedFolder(tree / "hsi", image_size=image_size)


def test_a_pixel_with_nodata_in_any_band_is_invalid_and_zero(tree, write_raster):
    cube = np.full((3, 8, 10), 2.0, np.float32)
    cube[1, 4:, :5] = -1
    write_raster(tree / "hsi" / "s0.tif", cube, nodata=-1)
    data = PairedFolder(tree / "hsi", normalization=IDENTITY)
    sample = data[0]
    assert not sample.valid[4:, :5].any()
    assert sample.valid.sum() == 80 - 20
    assert sample.hsi[0, :, ~sample.valid].abs().max() == 0
    assert (sample.hsi[0, :, sample.valid] == 2).all()
    small = PairedFolder(tree / "hsi", image_size=(4, 5), normalization=IDENTITY)[0]
    # Columns 4 and 5 of the ten make column 2 of five: half of it is valid, which counts as valid.
    assert small.valid.tolist() == [[True] * 5] * 2 + [[False, False, True, True, True]] * 2


def test_nodata_of_an_auxiliary_image_is_zero_after_normalisation(tree, write_raster):
    image = np.full((1, 4, 5), 3.0, np.float32)
    image[0, 0, 0] = -1
    (tree / "af").mkdir()
    write_raster(tree / "af" / "s0.tif", image, nodata=-1)
    statistics = Normalization({**IDENTITY.percentiles, "af": ((0.0, 1.0, 2.0),)})
    data = PairedFolder(tree / "hsi", {"af": tree / "af"}, normalization=statistics)
    assert data[0].aux["af"][0, 0, 0] == 0
    assert data[0].aux["af"][0, 1, 1] == 2


@pytest.mark.parametrize("modality", ["hsi", "ir"])
def test_values_that_are_not_finite_are_refused_with_modality_subject_and_path(tree, write_raster, modality):
    data = PairedFolder(tree / "hsi", {"ir": f"{tree / 'ir'}:0"}, normalization=IDENTITY)
    if modality == "hsi":
        write_raster(tree / "hsi" / "s2.tif", np.full((3, 8, 10), np.nan, np.float32), nodata=-1)
    else:
        np.save(tree / "ir" / "s2.npy", np.full((2, 4, 5), np.inf))
    with pytest.raises(ValueError, match=rf"modality '{modality}', subject 's2': .*s2\..*NaN or infinite"):
        data[2]
    lenient = PairedFolder(tree / "hsi", {"ir": f"{tree / 'ir'}:0"}, normalization=IDENTITY, check_finite=False)
    sample = lenient[2]
    assert not sample.valid.any() if modality == "hsi" else sample.aux == {}


def test_values_that_overflow_in_normalisation_are_refused(tree):
    extreme = Normalization({"hsi": ((-1e-38, 0.0, 1e-38),) * 3})
    data = PairedFolder(tree / "hsi", normalization=extreme)
    with pytest.raises(ValueError, match=r"modality 'hsi', subject 's0': .*s0\.tif: .* not finite after normalisation"):
        data[0]


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that `PairedFolder` reads, in order."""
    names = []

    def count(path, **options):
        names.append(path.name)
        return read_cube(path, **options)

    monkeypatch.setattr(image_files, "read_cube", count)
    return names


def test_statistics_are_computed_on_first_use_once_and_stored(tree, reads):
    path = tree / "statistics.json"
    data = PairedFolder(tree / "hsi", {"ir": f"{tree / 'ir'}:0"}, normalization=path)
    assert not path.exists()
    assert reads == ["s0.tif"]
    reads.clear()
    first = data[0]
    assert sorted(reads) == sorted(
        ["s0.tif", "s0.npy"] + [f"s{i}.tif" for i in range(4)] + ["s0.npy", "s2.npy", "s3.npy"]
    )
    reads.clear()
    data[0]
    assert reads == ["s0.tif", "s0.npy"]
    written = path.stat().st_mtime_ns
    again = PairedFolder(tree / "hsi", {"ir": f"{tree / 'ir'}:0"}, normalization=str(path))
    reads.clear()
    assert torch.equal(again[0].hsi, first.hsi)
    assert reads == ["s0.tif", "s0.npy"]
    assert path.stat().st_mtime_ns == written
    cubes = np.stack([read_cube(tree / "hsi" / f"s{i}.tif").values.numpy() for i in range(4)], axis=1).reshape(3, -1)
    np.testing.assert_allclose(data.normalization.percentiles["hsi"], np.percentile(cubes, [2, 50, 98], axis=1).T)


def _first_sample(tree, barrier, queue):
    computed = []
    original = PairedFolder._compute
    PairedFolder._compute = lambda self: (computed.append(1), original(self))[1]
    try:
        data = PairedFolder(tree / "hsi", normalization=tree / "statistics.json")
        barrier.wait()
        total = float(data[0].hsi.sum())
    except BaseException:
        barrier.abort()  # the others would wait for it
        raise
    queue.put((len(computed), total))


def test_processes_that_start_together_compute_the_statistics_once(tree):
    context = multiprocessing.get_context("fork")
    queue, barrier = context.SimpleQueue(), context.Barrier(4)
    processes = [context.Process(target=_first_sample, args=(tree, barrier, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    results = [queue.get() for _ in processes]
    assert sum(computed for computed, _ in results) == 1
    assert len({total for _, total in results}) == 1
    assert {path.name for path in tree.iterdir()} == {"hsi", "ir", "statistics.json"}


@pytest.mark.parametrize(
    ("percentiles", "selection", "message"),
    [
        ({"hsi": 3}, {}, "no statistics of modality 'ir'"),
        ({"hsi": 4, "ir": 1}, {}, "has 4 bands of modality 'hsi', the files give 3"),
        ({"hsi": 3, "ir": 1}, {"ir": "bands 1"}, "on other bands of modality 'ir': bands 1, expected bands 0"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_at_construction(tree, percentiles, selection, message):
    wrong = Normalization({name: ((0.0, 1.0, 2.0),) * count for name, count in percentiles.items()}, selection)
    wrong.save(tree / "statistics.json")
    for normalization in (wrong, tree / "statistics.json"):
        with pytest.raises(ValueError, match=message):
            PairedFolder(tree / "hsi", {"ir": f"{tree / 'ir'}:0"}, normalization=normalization)


def test_statistics_of_other_bands_of_the_cubes_are_refused(tree):
    path = tree / "statistics.json"
    PairedFolder(tree / "hsi", bands=[0, 1], normalization=path).normalization  # noqa: B018
    PairedFolder(tree / "hsi", bands=[0, 1], normalization=path)
    with pytest.raises(ValueError, match=r"measured on other bands .*: bands 0,1 of 3, expected bands 1,2 of 3"):
        PairedFolder(tree / "hsi", bands=[1, 2], normalization=path)


def test_statistics_cannot_be_promised_to_a_missing_folder(tree):
    with pytest.raises(ValueError, match="does not exist"):
        PairedFolder(tree / "hsi", normalization=tree / "none" / "statistics.json")


def test_axes_and_dataset_reach_the_files_of_their_modality(tree, values):
    (tree / "npz").mkdir()
    (tree / "aux").mkdir()
    np.savez(tree / "npz" / "a.npz", cube=values.transpose(1, 2, 0), other=values)
    np.save(tree / "aux" / "a.npy", values.transpose(1, 2, 0))
    data = PairedFolder(
        tree / "npz", {"x": tree / "aux"}, dataset="cube", axes={"hsi": "HWT", "x": "HWT"}, image_size=8
    )
    assert data.bands == 5
    assert data.modalities == {"x": 5}
    with pytest.raises(ValueError, match=r"axes= names \['y'\]"):
        PairedFolder(tree / "npz", axes={"y": "HWT"})


def test_workers_give_the_samples_of_the_main_process(tree):
    data = pickle.loads(pickle.dumps(PairedFolder(tree / "hsi", {"ir": f"{tree / 'ir'}:0"})))
    data.normalization  # noqa: B018
    make = partial(DataLoader, data, batch_size=2, collate_fn=partial(collate, modalities=data.modalities))
    for alone, worked in zip(make(), make(num_workers=2), strict=True):
        assert alone.names == worked.names
        assert torch.equal(alone.hsi, worked.hsi)
        assert torch.equal(alone.aux["ir"], worked.aux["ir"])


def test_no_file_stays_open(tree):
    from pathlib import Path

    data = PairedFolder(tree / "hsi", {"ir": tree / "ir"})
    data[0]
    open_files = {path.resolve() for path in Path("/proc/self/fd").glob("*") if path.exists()}
    assert not any(tree in path.parents for path in open_files)

"""Labels of subjects and pixels: valid and invalid files, and the subjects held out."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmmae.data import PairedFolder
from mmmae.training.finetuning import labels as labels_module
from mmmae.training.finetuning.labels import UNLABELLED, read_class_labels, read_mask_labels

SUBJECTS = SimpleNamespace(names=["a", "b", "c"], positions=(), cube_size=lambda index: None, files=lambda index: {})


@pytest.fixture
def scenes(tmp_path):
    """Two scenes of 24 x 40 pixels as tiles of 16, and masks in which every pixel has a class of its own."""
    for folder in ("hsi", "labels"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate(("north", "south")):
        np.save(tmp_path / "hsi" / f"{name}.npy", np.random.default_rng(number).random((3, 24, 40)))
        np.save(tmp_path / "labels" / f"{name}.npy", np.arange(24 * 40).reshape(24, 40) + 1000 * number)
    return PairedFolder(tmp_path / "hsi", tile=16), tmp_path / "labels"


def written(tmp_path, **masks):
    folder = tmp_path / "masks"
    folder.mkdir()
    for name, mask in masks.items():
        np.save(folder / f"{name}.npy", np.array(mask))
    return folder


def test_classes_of_a_csv_file_are_sorted_words_or_numbers(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("name,label,comment\na,tall,x\nc, short ,y\n")
    labels = read_class_labels(path, SUBJECTS)
    assert labels.classes == ["short", "tall"]
    assert {index: int(labels.target(index, (4, 4))) for index in labels.counts} == {0: 1, 2: 0}
    path.write_text("label,name\n10,a\n9,b\n")
    assert read_class_labels(path, SUBJECTS).classes == ["9", "10"]


def test_a_tile_has_its_scenes_label_unless_it_has_its_own(scenes, tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("name,label\nnorth,wet\nnorth@r0c16,dry\n")
    labels = read_class_labels(path, scenes[0])
    named = {scenes[0].names[index]: labels.classes[int(labels.target(index, (16, 16)))] for index in labels.counts}
    assert named["north@r0c16"] == "dry"
    assert named["north@r0c0"] == named["north@r8c24"] == "wet"
    assert len(named) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,klass\na,1\n", r"columns \['name', 'klass'\], expected name and label"),
        ("name,label\nd,1\n", "names 'd', which is not a subject"),
        ("name,label\na,1\na,2\n", "names 'a' twice"),
        ("name,label\na,\n", "no label for 'a'"),
        ("name,label\n", "for none of the subjects"),
        ("", "columns None"),
    ],
    ids=str,
)
def test_a_broken_csv_file_is_one_error_with_its_path(tmp_path, text, message):
    path = tmp_path / "classes.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_class_labels(path, SUBJECTS)
    assert str(path) in str(caught.value)


def test_classes_of_masks_are_numbered_without_gaps_and_255_is_no_label(tmp_path):
    folder = written(tmp_path, a=[[2, 7], [255, 2]], b=[[9, 9], [9, 255]])
    labels = read_mask_labels(folder, SUBJECTS)
    assert labels.classes == ["2", "7", "9"]
    assert labels.target(0, (2, 2)).tolist() == [[0, 1], [UNLABELLED, 0]]
    assert {index: counts.tolist() for index, counts in labels.counts.items()} == {0: [2, 1, 0], 1: [0, 0, 3]}
    assert read_mask_labels(folder, SUBJECTS, ignore=9).classes == ["2", "7", "255"]
    assert read_mask_labels(folder, SUBJECTS, names=["x", "y", "z"]).classes == ["x", "y", "z"]


def test_a_palette_is_classes_and_jpeg_is_refused(tmp_path):
    mask = Image.fromarray(np.array([[0, 3], [255, 7]], dtype=np.uint8), "P")
    mask.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    mask.save(tmp_path / "a.png")
    labels = read_mask_labels(tmp_path, SUBJECTS)
    assert labels.classes == ["0", "3", "7"]
    assert labels.target(0, (2, 2)).tolist() == [[0, 1], [UNLABELLED, 2]]
    mask.convert("L").save(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match=r"b\.jpg.* can't hold numbers of classes"):
        read_mask_labels(tmp_path, SUBJECTS)


def test_a_mask_of_another_size_takes_the_pixel_under_each_centre(tmp_path):
    mask = np.arange(16).reshape(4, 4)
    labels = read_mask_labels(written(tmp_path, a=mask), SUBJECTS)
    assert torch.equal(
        labels.target(0, (8, 8)), torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    assert labels.target(0, (2, 2)).tolist() == [[5, 7], [13, 15]]  # a centre on an edge belongs to what follows


def test_a_tile_has_its_window_of_the_mask(scenes):
    subjects, folder = scenes
    labels = read_mask_labels(folder, subjects)
    place = subjects.names.index("south@r8c24")
    numbers = torch.tensor([int(labels.classes[number]) for number in labels.target(place, (16, 16)).flatten()])
    expected = torch.arange(24 * 40).view(24, 40)[8:24, 24:40] + 1000
    assert torch.equal(numbers.view(16, 16), expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[0.5, 1], [1, 1]], "not classes, expected whole numbers >= 0, and 255 where there is no label"),
        ([[-1, 1], [1, 1]], "values that are not classes"),
        (np.ones((2, 8, 8)), "has 2 bands, expected one band of classes"),
        ([[255, 255]], "for none of the subjects"),
    ],
    ids=["fractions", "negative", "bands", "nothing"],
)
def test_a_mask_that_is_none_is_refused(tmp_path, mask, message):
    with pytest.raises(ValueError, match=message):
        read_mask_labels(written(tmp_path, a=mask), SUBJECTS)


def test_a_mask_smaller_than_its_scene_and_wrong_names_are_refused(scenes):
    subjects, folder = scenes
    with pytest.raises(ValueError, match="there are 2 names of classes"):
        read_mask_labels(folder, subjects, names=["x", "y"])
    np.save(folder / "north.npy", np.ones((20, 40)))
    with pytest.raises(ValueError, match=r"north.npy, subject 'north@r0c0': the labels are 20 x 40, the cube is 24"):
        read_mask_labels(folder, subjects)


@pytest.mark.parametrize("factor", [2, 0.5])
def test_a_tile_has_its_window_of_a_mask_of_another_resolution(scenes, factor):
    subjects, folder = scenes
    fine = np.kron(np.arange(6 * 10).reshape(6, 10), np.ones((4, 4)))
    for name in ("north", "south"):
        np.save(folder / f"{name}.npy", fine.repeat(2, 0).repeat(2, 1) if factor == 2 else fine[::2, ::2])
    labels = read_mask_labels(folder, subjects)
    for index, (_, window) in enumerate(subjects.positions):
        assert labels.target(index, (16, 16)).tolist() == fine[window.slices].tolist()


def test_a_mask_of_another_aspect_than_its_cube_is_refused(tmp_path):
    (tmp_path / "hsi").mkdir()
    np.save(tmp_path / "hsi" / "a.npy", np.ones((3, 24, 40)))
    subjects = PairedFolder(tmp_path / "hsi", image_size=32)
    with pytest.raises(ValueError, match=r"a.npy, subject 'a': the labels are 8 x 8, the cube is 24 x 40;"):
        read_mask_labels(written(tmp_path, a=np.arange(64).reshape(8, 8)), subjects)
    np.save(tmp_path / "masks" / "a.npy", np.arange(60).reshape(6, 10))
    read_mask_labels(tmp_path / "masks", subjects)


def test_labels_can_be_sent_to_a_worker(scenes, tmp_path):
    subjects, folder = scenes
    path = tmp_path / "classes.csv"
    path.write_text("name,label\nnorth,wet\nsouth,dry\n")
    for labels in (read_mask_labels(folder, subjects), read_class_labels(path, subjects)):
        sent = pickle.loads(pickle.dumps(labels))
        assert all(torch.equal(sent.target(index, (16, 16)), labels.target(index, (16, 16))) for index in range(12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,label\na," + b"x" * 200_000, "field larger than field limit"),
        (b"name,label\na,\xff\n", "can't decode byte 0xff"),
    ],
    ids=["long", "not UTF-8"],
)
def test_what_is_no_csv_file_is_one_error_with_its_path(tmp_path, content, message):
    path = tmp_path / "classes.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_class_labels(path, SUBJECTS)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("label", ["\u00b2", "--5", "9" * 5000], ids=["superscript", "two signs", "long"])
def test_a_label_that_is_nearly_a_number_is_a_word(tmp_path, label):
    path = tmp_path / "classes.csv"
    path.write_text(f"name,label\na,{label}\nb,10\n", encoding="utf-8")
    assert sorted(read_class_labels(path, SUBJECTS).classes) == sorted(["10", label])


def test_places_of_labels_are_compared_once_a_scene(scenes, monkeypatch):
    looked = []
    monkeypatch.setattr("mmmae.training.finetuning.labels.find_georeference", looked.append)
    subjects, folder = scenes
    labels = read_mask_labels(folder, subjects)
    assert len(looked) == 4  # raster and cube of two scenes
    for north, south in zip(range(6), range(6, 12), strict=True):
        for index in (north, south):
            labels.target(index, (16, 16))
    assert len(looked) == 4


@pytest.mark.parametrize(
    ("rasters", "read_again"), [(3, []), (2, ["east", "south"]), (0.1, ["north", "east", "north", "south"])]
)
def test_rasters_that_were_used_last_are_kept_within_a_limit_of_bytes(scenes, monkeypatch, rasters, read_again):
    read, looked = labels_module._read_mask, []
    monkeypatch.setattr(labels_module, "MOST_BYTES", int(rasters * 24 * 40 * 2))
    monkeypatch.setattr(labels_module, "_read_mask", lambda path, *rest: looked.append(path.stem) or read(path, *rest))
    folder = scenes[1]
    np.save(folder.parent / "hsi" / "east.npy", np.ones((3, 24, 40)))
    masks = {name: np.arange(24 * 40).reshape(24, 40) for name in ("east", "north", "south")}  # 16 bits each
    for name, mask in masks.items():
        np.save(folder / f"{name}.npy", mask)
    subjects = PairedFolder(folder.parent / "hsi", tile=16)
    labels = read_mask_labels(folder, subjects, ignore=999)
    looked.clear()
    for name in ("north@r8c24", "east@r0c0", "north@r0c0", "south@r8c16", "south@r0c0"):
        index = subjects.names.index(name)
        scene, window = subjects.positions[index]
        assert labels.target(index).tolist() == masks[scene][window.slices].tolist()
    assert looked == read_again


def test_labels_of_several_arrays_say_that_no_option_chooses_one(tmp_path):
    np.savez(tmp_path / "a.npz", one=np.ones((8, 8)), two=np.ones((8, 8)))
    with pytest.raises(ValueError, match=r"a.npz: .* several 2-D arrays.*; files of labels take no such option"):
        read_mask_labels(tmp_path, SUBJECTS)

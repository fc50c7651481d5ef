"""Splits of labels into those that train and those that are held out: subjects, groups, pixels and blocks."""

import pickle
import re

import numpy as np
import pytest
import scipy.io
import torch

from mmmae.cli import main
from mmmae.data import PairedFolder, Sample, Subjects
from mmmae.data.readers.windows import tile_grid
from mmmae.data.tiles import Position
from mmmae.training.finetuning.labels import UNLABELLED, Labels, read_mask_labels, scene_names, scene_targets
from mmmae.training.finetuning.masks import divide_by_masks
from mmmae.training.finetuning.pixel_splits import GAP, NONE, TEST, TRAIN
from mmmae.training.finetuning.splits import divide


class Scenes(Subjects):
    """Tiles of scenes, or whole scenes without `tile`, of zeros; `valid` has the pixels with data of each scene."""

    bands = 1

    def __init__(self, scenes, size=(40, 56), tile=16, overlap=8, valid=None):
        grid = tile_grid(*size, tile, overlap) if tile else ()
        self.positions = [Position(scene, window) for scene in scenes for window in grid]
        self.names = [place.name for place in self.positions] or list(scenes)
        self.valid = {scene: torch.ones(size, dtype=torch.bool) for scene in scenes} | (valid or {})

    def __getitem__(self, index):
        valid = self.valid[scene_names(self)[index]]
        valid = valid[self.positions[index].window.slices] if self.positions else valid
        return Sample(self.names[index], torch.zeros(1, 1, *valid.shape), {}, valid)


def labels_of(subjects, size=(40, 56), classes=5, seed=0):
    """Labels in patches of 4 x 4 pixels, a sixth of them without a label, of classes that are rarer and rarer."""
    rng, targets = np.random.default_rng(seed), {}
    for scene in dict.fromkeys(scene_names(subjects)):
        drawn = rng.choice([UNLABELLED, *range(classes)], (10, 14), p=[1 / 6, 1 / 3, 1 / 4, 1 / 8, 1 / 12, 1 / 24])
        targets[scene] = torch.from_numpy(drawn.repeat(4, 0).repeat(4, 1))
    maps = [targets[scene] for scene in scene_names(subjects)]
    if subjects.positions:
        maps = [target[place.window.slices] for target, place in zip(maps, subjects.positions, strict=True)]
    counts = {i: torch.bincount(target[target >= 0], minlength=classes) for i, target in enumerate(maps)}
    return Labels("segmentation", [f"class{number}" for number in range(classes)], counts, maps.__getitem__)


def class_labels(names):
    counts = {index: torch.tensor([1, 0]) for index in range(len(names))}
    return Labels("classification", ["x", "y"], counts, lambda index: torch.tensor(0))


def test_the_tiles_of_a_scene_are_held_out_together():
    subjects = Scenes(["north", "south"])
    labels, of = labels_of(subjects), scene_names(subjects)
    for validation in (["south"], 0.5, 0.01, 0.6):
        parts = divide(subjects, labels, "subjects", validation=validation, seed=3)
        assert len(parts.training.counts) == len(parts.held_out.counts) == len(of) / 2
        assert not {of[index] for index in parts.training.counts} & {of[index] for index in parts.held_out.counts}
    assert {of[index] for index in divide(subjects, labels, validation=["south"]).held_out.counts} == {"south"}


def test_subjects_without_a_label_are_on_no_side():
    subjects = Scenes("abc", tile=None)
    labels = labels_of(subjects).only([0, 2])
    parts = divide(subjects, labels, "subjects:0.5")
    assert sorted([*parts.training.counts, *parts.held_out.counts]) == [0, 2]
    parts = divide(subjects, labels, validation=["c"])
    assert (list(parts.training.counts), list(parts.held_out.counts)) == ([0], [2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": ["b"]}, "names 'b', expected names of labelled"),
        ({"validation": ["a", "c"]}, "0 subjects are left to train with"),
        ({"validation": 0.9}, "0 subjects"),
        ({"validation": 1.5}, "validation is 1.5"),
        ({"validation": ["a"], "fold": "1/2"}, "exclude each other"),
        ({"fold": "1/3"}, "fold is 1/3, expected at most as many parts as 2 subjects"),
        ({"fold": "3/2"}, "fold is '3/2', expected K/N"),
        ({"split": "pixels:2"}, "expected a share in"),
        ({"split": "pixels:0.5", "fold": "1/2"}, "expected no fold with a split by pixels"),
        ({"split": "blocks"}, "expected blocks:PIXELS"),
        ({"split": "blocks:99"}, "2 blocks of 99 x 99 pixels have labels, expected at least 3"),
        ({"split": "blocks:8", "validation": ["a"]}, "expected a share of the blocks"),
        (
            {"split": "blocks:8"},
            "leaves no pixel to train with: the model sees each scene whole.*cut scenes into tiles",
        ),
        ({"split": "blocks:400"}, r"expected at least 3; give smaller blocks, as in --split blocks:50$"),
        ({"split": "subjects:0.5", "validation": ["a"]}, "split is 'subjects:0.5'.*expected no validation with it"),
        ({"split": "subjects:0.5", "fold": "1/2"}, "split is 'subjects:0.5'.*expected no fold with it"),
        ({"split": "pixels:0.5", "validation": ["a"]}, "split is 'pixels:0.5'.*expected no validation with it"),
        ({"split": "blocks:8", "validation": 0.5, "fold": "1/2"}, "a fold and validation exclude each other"),
        ({"split": "halves"}, "split is 'halves', expected subjects:SHARE, pixels:SHARE"),
    ],
    ids=str,
)
def test_a_split_that_does_not_fit_is_refused(options, message):
    subjects = Scenes("abc", tile=None)
    options = {"fold": "1/3", **options} if options.get("split") in ("blocks:99", "blocks:400") else options
    with pytest.raises(ValueError, match=message):
        divide(subjects, labels_of(subjects).only([0, 2]), **options)


def test_each_fold_holds_out_other_subjects_and_together_all():
    subjects = Scenes("abcdefg", tile=None)
    labels = class_labels(subjects.names)
    held = [list(divide(subjects, labels, fold=f"{part}/3", seed=1).held_out.counts) for part in (1, 2, 3)]
    assert sorted(index for part in held for index in part) == list(range(7))
    assert [len(part) for part in held] == [3, 2, 2]


def test_pixels_are_drawn_class_by_class_and_each_is_on_one_side():
    subjects = Scenes(["a"])
    labels = labels_of(subjects)
    parts = divide(subjects, labels, "pixels:0.1", seed=2)
    whole = scene_targets(subjects, labels)["a"]
    train, test = (scene_targets(subjects, side)["a"] for side in (parts.training, parts.held_out))
    assert not ((train != UNLABELLED) & (test != UNLABELLED)).any()
    assert torch.equal(torch.where(train != UNLABELLED, train, test), whole)
    for number in range(5):
        assert (train == number).sum() == round(0.1 * int((whole == number).sum()))
    assert parts.pixels() == {"training": int((train >= 0).sum()), "test": int((test >= 0).sum()), "gap": 0}
    assert not torch.equal(divide(subjects, labels, "pixels:0.1", seed=3).roles["a"], parts.roles["a"])
    assert torch.equal(divide(subjects, labels, "pixels:0.1", seed=2).roles["a"], parts.roles["a"])
    for side in (parts.training, parts.held_out):
        for index, counts in side.counts.items():
            target = side.target(index)
            assert torch.equal(torch.bincount(target[target >= 0], minlength=5), counts)


def test_a_class_of_one_pixel_trains_and_one_of_two_does_both():
    target = torch.tensor([[0, 1, 1, 2], [2, 2, 2, 2]])
    counts = {0: torch.bincount(target.flatten())}
    labels = Labels("segmentation", ["a", "b", "c"], counts, lambda index: target)
    parts = divide(Scenes("s", (2, 4), tile=None), labels, "pixels:0.99")
    assert parts.training.counts[0].tolist() == [1, 1, 4]
    assert parts.held_out.counts[0].tolist() == [0, 1, 1]


@pytest.mark.parametrize("split", ["blocks:16", "blocks:13"])
def test_no_tile_to_train_with_has_a_pixel_to_test_with_and_no_other_pixel_is_lost(split):
    subjects = Scenes(["a", "b"])
    labels = labels_of(subjects)
    parts = divide(subjects, labels, split, seed=1)
    roles = [parts.roles[place.scene][place.window.slices] for place in subjects.positions]
    assert parts.training.counts
    for index in parts.training.counts:
        assert not (roles[index] == TEST).any()
        assert torch.equal(parts.training.target(index) != UNLABELLED, roles[index] == TRAIN)
    clean = {scene: torch.zeros(40, 56, dtype=torch.bool) for scene in "ab"}
    for role, place in zip(roles, subjects.positions, strict=True):
        clean[place.scene][place.window.slices] |= not (role == TEST).any()
    for scene, target in scene_targets(subjects, labels).items():
        role = parts.roles[scene]
        assert torch.equal(role == NONE, target == UNLABELLED)
        assert torch.equal(role == GAP, (target != UNLABELLED) & (role != TEST) & ~clean[scene])
    assert parts.pixels()["gap"] > 0 if split == "blocks:13" else parts.text.startswith("5 of 24 blocks of 16 x 16")


def test_no_window_around_a_pixel_to_train_with_has_a_pixel_to_test_with():
    subjects = Scenes(["a"], tile=None)
    parts = divide(subjects, labels_of(subjects), "blocks:12", window=7, seed=0)
    roles = parts.roles["a"]
    for row, column in (roles == TRAIN).nonzero().tolist():
        assert not (roles[max(0, row - 3) : row + 4, max(0, column - 3) : column + 4] == TEST).any()
    for row, column in (roles == GAP).nonzero().tolist():
        assert (roles[max(0, row - 3) : row + 4, max(0, column - 3) : column + 4] == TEST).any()
    assert all((roles == role).any() for role in (TRAIN, TEST, GAP))


def test_a_window_is_of_the_cube_where_labels_are_finer():
    subjects, fine = Scenes(["a"], tile=None), labels_of(Scenes(["a"], tile=None)).target(0)
    fine = fine.repeat_interleave(2, 0).repeat_interleave(2, 1)
    labels = Labels("segmentation", list("vwxyz"), {0: torch.bincount(fine[fine >= 0], minlength=5)}, lambda _: fine)
    parts = divide(subjects, labels, "blocks:12", window=7, seed=0)
    assert torch.equal(parts.roles["a"], divide(subjects, labels_of(subjects), "blocks:12", window=7).roles["a"])
    assert parts.training.counts[0].sum() == parts.pixels()["training"]
    assert torch.equal(parts.training.target(0, (40, 56)) != UNLABELLED, parts.roles["a"] == TRAIN)


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("split", ["pixels:0.3", "blocks:16", "subjects:0.5", "table:{}"])
def test_pixels_without_data_in_the_cube_are_on_no_side(tmp_path, tile, split):
    window = 5 if tile is None and ":0.5" not in split and "table" not in split else None
    valid = {"a": torch.rand(40, 56, generator=torch.Generator().manual_seed(0)) > 0.5, "c": torch.zeros(40, 56) > 0}
    subjects = Scenes("abc", tile=tile, valid=valid)
    (tmp_path / "t.csv").write_text("name,split\na,train\nb,test\nc,train\n")
    labels = labels_of(subjects)
    parts = divide(subjects, labels, split.format(tmp_path / "t.csv"), window=window)
    assert "c" not in {
        scene_names(subjects)[index] for side in (parts.training, parts.held_out) for index in side.counts
    }
    for side in (parts.training, parts.held_out):
        for index, counts in side.counts.items():
            target = side.target(index)
            assert bool(((target == UNLABELLED) | subjects[index].valid).all())
            assert torch.equal(torch.bincount(target[target >= 0], minlength=5), counts)
    if split.startswith("pixels"):
        known = sum(int(((labels.target(i) >= 0) & subjects[i].valid).sum()) for i in labels.counts)
        assert tile or sum(parts.pixels().values()) == known


def test_labels_of_which_none_has_data_are_refused():
    subjects = Scenes("ab", tile=None, valid={name: torch.zeros(40, 56, dtype=torch.bool) for name in "ab"})
    with pytest.raises(ValueError, match="no labelled pixel has data in its cube"):
        divide(subjects, labels_of(subjects), "subjects")


@pytest.mark.parametrize("column", ["split", "group"])
def test_pixels_that_tiles_of_both_sides_share_do_not_train(tmp_path, column):
    subjects, table = Scenes("ab"), tmp_path / "tiles.csv"
    labels, names = labels_of(subjects), subjects.names
    held = {name for name in names if name.startswith("a@r24")}
    rows = [f"{name},{'test' if name in held else 'train'}" for name in names]
    table.write_text("\n".join([f"name,{column}", *rows]))
    validation = 0.2 if column == "split" else ["test"]
    parts = divide(subjects, labels, f"table:{table}", validation=validation)
    whole = scene_targets(subjects, labels)
    train, test = (scene_targets(subjects, side) for side in (parts.training, parts.held_out))
    assert torch.equal(test["a"][24:], whole["a"][24:])
    assert torch.equal(train["a"][:24], whole["a"][:24])
    assert bool((train["a"][24:] == UNLABELLED).all())
    assert torch.equal(train["b"], whole["b"])
    shared = int((whole["a"][24:32] >= 0).sum())  # the tiles above end at row 32
    assert parts.text.endswith(f"; {shared} labelled pixels that tiles of both sides share do not train")
    assert parts.pixels() == {
        "training": sum(int((t >= 0).sum()) for t in train.values()),
        "test": int((test["a"] >= 0).sum()),
        "gap": 0,
    }
    words = class_labels(names)
    assert divide(subjects, words, f"table:{table}", validation=validation).text.endswith(
        "; 6 tiles that train overlap with tiles that are held out"
    )


@pytest.mark.parametrize("window", ["0", "-1", "8"])
def test_a_window_that_has_no_centre_is_refused(capsys, window):
    words = ["--scratch", "--hsi", "none", "--labels", "none", "--task", "pixels", "--window", window]
    assert main(["finetune", *words]) == 2
    assert f"--window is {window}, expected an odd number of pixels" in capsys.readouterr().err


def test_each_fold_of_blocks_holds_out_other_pixels_and_together_all():
    subjects = Scenes(["a"])
    labels = labels_of(subjects)
    tested = [divide(subjects, labels, "blocks:16", fold=f"{part}/4").roles["a"] == TEST for part in (1, 2, 3, 4)]
    assert torch.equal(torch.stack(tested).sum(0), (scene_targets(subjects, labels)["a"] != UNLABELLED).long())


def test_blocks_are_drawn_so_that_much_of_each_class_trains():
    target = torch.zeros(32, 32, dtype=torch.int64)
    target[:8, 8:16] = target[16:24, 24:] = 1  # two blocks full of a rare class
    target[25, 1] = 1  # with which the class would be on both sides if both of them were held out
    labels = Labels("segmentation", ["a", "b"], {0: torch.bincount(target.flatten())}, lambda index: target)
    for seed in range(10):
        parts = divide(Scenes("s", (32, 32), tile=None), labels, "blocks:8", validation=0.5, window=1, seed=seed)
        assert parts.training.counts[0][1] >= 64
        assert parts.held_out.counts[0][1] >= 1


@pytest.mark.parametrize(
    ("tile", "window", "split", "advice"),
    [
        (16, None, "blocks:3", r"; blocks whose side is a multiple of the tiles' lose fewest, as in blocks:16$"),
        (16, None, "blocks:16", "between them$"),
        (None, 15, "blocks:3", "; larger blocks lose fewer$"),
        (None, None, "blocks:3", r"; scenes that are cut into tiles \(--tile\) lose fewer$"),
    ],
    ids=["small", "of a tile", "windows", "whole"],
)
def test_where_more_labels_are_lost_than_train_other_blocks_are_advised(tile, window, split, advice):
    subjects = Scenes("abc", tile=tile)
    share = 0.06 if tile or window else 0.003  # of 756 blocks: the blocks of one or two scenes
    parts = divide(subjects, labels_of(subjects), split, validation=share, window=window)
    assert re.search(advice, parts.text)


def test_one_scene_is_divided_into_blocks_of_a_tile_and_one_that_is_seen_whole_is_refused():
    subjects = Scenes(["a"])
    assert divide(subjects, labels_of(subjects)).text.startswith("2 of 12 blocks of 16 x 16 pixels are held out: ")
    whole = Scenes(["a"], tile=None)
    assert "blocks of 15 x 15" in divide(whole, labels_of(whole), window=5).text
    with pytest.raises(ValueError, match=r"one subject has labels.*--tile PIXELS.*--task pixels"):
        divide(whole, labels_of(whole))


def test_groups_of_a_table_are_held_out_together_and_a_split_is_taken_as_it_is(tmp_path):
    subjects, table = Scenes("abcdef", tile=None), tmp_path / "trees.csv"
    labels = class_labels(subjects.names)
    table.write_text("name,group,year\na,oak,1\nb,elm,1\nc,oak,2\nd,ash,1\ne,elm,2\n")
    for options in ({"validation": ["oak"]}, {"validation": 0.3}, {"fold": "2/3"}):
        parts = divide(subjects, labels, f"table:{table}", **options)
        held = {"abcdef"[index] for index in parts.held_out.counts}
        assert held in ({"a", "c"}, {"b", "e"}, {"d"})
        assert {"abcdef"[index] for index in parts.training.counts} == set("abcde") - held
        assert f"1 labelled subjects are not in {table}" in parts.text
    table.write_text("name,split\na,train\nb,Test\nc,training\n")
    parts = divide(subjects, labels, f"table:{table}")
    assert (list(parts.training.counts), list(parts.held_out.counts)) == ([0, 2], [1])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("name,part\na,1\n", {}, r"columns \['name', 'part'\], expected name, and either group or split"),
        ("name,group,split\na,1,train\n", {}, "expected name, and either group or split"),
        ("name,group\nz,1\n", {}, "names 'z', which is not a subject"),
        ("name,group\na,1\na,2\n", {}, "names 'a' twice"),
        ("name,group\na,\n", {}, "no group for 'a'"),
        (
            "name,group\na,1\nb,2\n",
            {"validation": ["3"]},
            "names '3', expected names of groups, such as '1'",
        ),
        ("name,split\na,train\nb,exam\n", {}, "has the split 'exam', must be one of train"),
        ("name,split\na,train\nb,train\n", {}, "gives 2 labelled subjects to train, 0 to test"),
        ("name,split\na,train\nb,test\n", {"fold": "1/2"}, "expected no fold and no validation"),
        ("name,split\na,train\nb,test\n", {"validation": 0.5}, "expected no fold and no validation"),
    ],
    ids=str,
)
def test_a_broken_table_is_one_error_with_its_path(tmp_path, text, options, message):
    subjects, table = Scenes("abc", tile=None), tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        divide(subjects, class_labels(subjects.names), f"table:{table}", **options)


def test_divided_labels_can_be_sent_to_a_worker():
    subjects = Scenes(["a"])
    parts = divide(subjects, labels_of(subjects), "blocks:16")
    for side in (parts.training, parts.held_out):
        sent = pickle.loads(pickle.dumps(side))
        assert all(torch.equal(sent.target(index), side.target(index)) for index in side.counts)


@pytest.fixture
def one_scene(tmp_path):
    """One scene of 24 x 40 pixels as tiles of 16, and rasters of its labels, 0 where there is none."""
    labels = np.random.default_rng(0).integers(0, 4, (24, 40)).astype(np.uint8) * 2
    (tmp_path / "hsi").mkdir()
    np.save(tmp_path / "hsi" / "s.npy", np.random.default_rng(1).random((3, 24, 40)))
    train, test = (np.where(np.arange(40) % 4 == column, labels, 0).astype(np.uint8) for column in (0, 1))
    for name, raster in {"all": labels, "TR": train, "TE": test * (test != 2)}.items():
        np.save(tmp_path / f"{name}.npy", raster)
    np.savez(tmp_path / "all.npz", all=labels)
    np.savez(tmp_path / "one.npz", TR=train, TE=0 * test)
    return PairedFolder(tmp_path / "hsi", tile=16), tmp_path


def test_masks_divide_labels_as_they_are(one_scene):
    subjects, folder = one_scene
    labels, parts = divide_by_masks(f"{folder}/TR.npy,{folder}/TE.npy", subjects, ignore=0)
    assert labels.classes == ["2", "4", "6"]
    assert labels.numbers == parts.training.numbers == [2, 4, 6]
    for side, name in ((parts.training, "TR"), (parts.held_out, "TE")):
        expected = torch.from_numpy(np.load(folder / f"{name}.npy")).long()
        found = scene_targets(subjects, side)["s"]
        assert torch.equal(torch.where(found == UNLABELLED, 0, (found + 1) * 2), expected)
        assert torch.equal(parts.roles["s"] == (TRAIN if name == "TR" else TEST), expected > 0)
    whole = scene_targets(subjects, labels)["s"]
    assert torch.equal(whole != UNLABELLED, parts.roles["s"] != NONE)
    both = sum(side.counts[0] for side in (parts.training, parts.held_out))
    assert torch.equal(labels.counts[0], both)
    for name in ("train", "test"):
        (folder / name).mkdir()
        (folder / ("TR.npy" if name == "train" else "TE.npy")).rename(folder / name / "s.npy")
    assert torch.equal(divide_by_masks(str(folder), subjects, ignore=0)[1].roles["s"], parts.roles["s"])


def test_one_file_may_hold_the_labels_that_train_and_that_test_beside_the_cube(one_scene):
    subjects, folder = one_scene
    arrays = {name: np.load(folder / f"{name}.npy").astype(np.float64) for name in ("TE", "TR")}
    scipy.io.savemat(folder / "both.mat", arrays | {"input": np.zeros((24, 40, 3))})
    expected = divide_by_masks(f"{folder}/TR.npy,{folder}/TE.npy", subjects, ignore=0)[1]
    found = divide_by_masks(f"{folder}/both.mat", subjects, ignore=0)[1]
    assert torch.equal(found.roles["s"], expected.roles["s"])
    for side in ("training", "held_out"):
        targets = (scene_targets(subjects, getattr(parts, side))["s"] for parts in (found, expected))
        assert torch.equal(*targets)
    with pytest.raises(ValueError, match=r"both\.mat has 3 bands.*; --split masks:.*both\.mat without --labels reads"):
        read_mask_labels(folder / "both.mat", subjects, ignore=0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ("{}/TR.npy", "expected TRAIN,TEST"),
        ("{}/all.npz", r"all\.npz.*no array 'TR'; the file has all"),
        ("{0}/TR.npy,{0}/all.npy", r"\d+ pixels of 's' have a label in both, expected in one of them$"),
        ("{0}/TR.npy,{0}/none", "none"),
        ("{}/one.npz", r"one\.npz, array TE has labels for none of the subjects"),
    ],
    ids=str,
)
def test_masks_that_do_not_divide_are_refused(one_scene, masks, message):
    subjects, folder = one_scene
    with pytest.raises(ValueError, match=message):
        divide_by_masks(masks.format(folder), subjects, ignore=0)


def test_what_zero_may_mean_in_both_rasters_is_asked_and_a_side_without_data_is_refused(one_scene):
    subjects, folder = one_scene
    with pytest.raises(ValueError, match=r"'s' have a label in both.*; if 0 means not labelled, give --ignore 0$"):
        divide_by_masks(f"{folder}/TR.npy,{folder}/TE.npy", subjects)
    cube = np.load(folder / "hsi" / "s.npy")
    cube[:, :, 1::4] = np.nan
    np.savez(folder / "hsi" / "s.npz", cube=cube, nodata=np.nan)
    (folder / "hsi" / "s.npy").unlink()
    with pytest.raises(ValueError, match=r"TE\.npy: no labelled pixel has data"):
        divide_by_masks(f"{folder}/TR.npy,{folder}/TE.npy", PairedFolder(folder / "hsi", tile=16), ignore=0)


def test_the_one_raster_of_one_scene_may_have_any_name(one_scene):
    subjects, folder = one_scene
    assert read_mask_labels(folder / "all.npy", subjects, ignore=0).classes == ["2", "4", "6"]
    np.save(folder / "hsi" / "t.npy", np.zeros((3, 24, 40)))
    with pytest.raises(ValueError, match="is one file, and there are 2 scenes; expected a folder"):
        read_mask_labels(folder / "all.npy", PairedFolder(folder / "hsi"))

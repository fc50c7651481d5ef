"""Labels that are divided already, into rasters of those that train and rasters of those that test."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...data.readers.formats import CONTAINER_SUFFIXES
from ...data.subjects import Subjects
from .divided import Split
from .labels import BOTH_SIDES, IGNORE, UNLABELLED, Labels, name_array, read_masks_alike, scene_targets
from .pixel_splits import NONE, TEST, TRAIN
from .valid import valid_labels


def divide_by_masks(
    masks: str,
    subjects: Subjects,
    *,
    ignore: int = IGNORE,
    names: Sequence[str] | None = None,
    window: int | None = None,
) -> tuple[Labels, Split]:
    """Read labels that are divided already, into rasters of those that train and rasters of those that test.

    Args:
        masks: `TRAIN,TEST`, two folders or, for one scene, two files as in `read_mask_labels`; one folder with the
            folders `train` and `test`; or, for one scene, one file with the arrays `TR` and `TE`.
        subjects, ignore, names: as in `read_mask_labels`.
        window: the side of the square around each pixel that the model sees; None: it sees whole subjects.

    Returns:
        The labels of both, and how they are divided.

    Raises:
        ValueError: rasters can't be read or do not fit, a pixel is in both, or a side has no valid pixel.
    """
    pair, arrays = _find_pair(masks)
    given = read_masks_alike(pair, subjects, ignore=ignore, names=names, arrays=arrays)
    sides = [name_array(path, array) for path, array in zip(pair, arrays, strict=True)]
    train, test = (_valid(name, subjects, side, window) for name, side in zip(sides, given, strict=True))
    targets = {TRAIN: scene_targets(subjects, train), TEST: scene_targets(subjects, test)}
    roles: dict[str, Tensor] = {}
    for role, scenes in targets.items():
        for scene, target in scenes.items():
            known = roles.setdefault(scene, torch.full(target.shape, NONE, dtype=torch.uint8))
            if known.shape != target.shape:
                raise ValueError(f"{masks}: the two rasters of {scene!r} differ in size, expected the same")
            both = (known != NONE) & (target != UNLABELLED)
            if both.any():
                raise ValueError(
                    f"{masks}: {int(both.sum()):,} pixels of {scene!r} have a label in both, expected in one of them"
                    + _ignored(train, targets[TRAIN][scene][both], target[both])
                )
            known[target != UNLABELLED] = role
    split = Split(train, test, "", roles)
    pixels = split.pixels()
    text = f"masks {masks}: {pixels['training']:,} pixels train, {pixels['test']:,} test"
    none = torch.zeros(len(train.classes), dtype=torch.int64)
    indices = sorted({*train.counts, *test.counts})
    whole = {index: train.counts.get(index, none) + test.counts.get(index, none) for index in indices}
    both_sides = Labels("segmentation", train.classes, whole, _Either(train, test), train.numbers)
    return both_sides, dataclasses.replace(split, text=text)


def _find_pair(masks: str) -> tuple[list[Path], Sequence[str | None]]:
    """Return the folders or files of the labels that train and that test, and the array to read of each."""
    path = Path(masks)
    if path.is_dir():
        return [path / "train", path / "test"], (None, None)
    if path.is_file() and path.suffix.lower() in {*CONTAINER_SUFFIXES} - {".npy"}:  # which holds one array
        return [path, path], BOTH_SIDES
    pair = [Path(part) for part in masks.split(",")]
    if len(pair) != 2:
        raise ValueError(
            f"masks is {masks!r}, expected TRAIN,TEST, two folders or files of labels with a comma between; a folder "
            "with the folders train and test; or one .mat, .npz or HDF5 file with the arrays TR and TE"
        )
    return pair, (None, None)


def _valid(name: str, subjects: Subjects, side: Labels, window: int | None) -> Labels:
    try:
        return valid_labels(subjects, side, window)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _ignored(labels: Labels, train: Tensor, test: Tensor) -> str:
    """Return what helps if, of the labels that pixels have in both rasters, one is always the same number."""
    numbers = [
        number for place, number in enumerate(labels.numbers or ()) if ((train == place) | (test == place)).all()
    ]
    return f"; if {numbers[0]} means not labelled, give --ignore {numbers[0]}" if len(numbers) == 1 else ""


class _Either:
    """Reads the targets of subjects that have labels in one of two rasters, or in both."""

    def __init__(self, train: Labels, test: Labels) -> None:
        self.sides = [train, test]

    def __call__(self, index: int) -> Tensor:
        found = [side.target(index) for side in self.sides if index in side.counts]
        return found[0] if len(found) == 1 else torch.where(found[0] == UNLABELLED, found[1], found[0])

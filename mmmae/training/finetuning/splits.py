"""Division of labels into those that train and those that are held out: by subjects, a table, pixels or blocks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...data.subjects import Subjects
from .divided import Split, divide_by_role, without_shared_pixels
from .labels import Labels, scene_names, scene_targets
from .pixel_splits import draw_blocks, draw_pixels
from .tables import read_table
from .valid import valid_labels

KINDS = "subjects:SHARE, pixels:SHARE, blocks:PIXELS, table:FILE.csv or masks:TRAIN,TEST"
VALIDATION = 0.2  # the share that is held out if nothing else is said
SIDES = {"train": True, "training": True, "test": False, "validation": False, "held-out": False}


def divide(
    subjects: Subjects,
    labels: Labels,
    split: str | None = None,
    *,
    validation: Sequence[str] | float = VALIDATION,
    fold: str | None = None,
    seed: int = 0,
    window: int | None = None,
) -> Split:
    """Divide labels into those that train and those that are held out.

    Labels of pixels that are not valid in the cube are on neither side.

    Args:
        subjects: the subjects, or the tiles of scenes.
        labels: their labels.
        split: `subjects` or `subjects:SHARE` holds out whole subjects, and the tiles of a scene together;
            `pixels:SHARE` trains with this share of each class's pixels and tests with the others; `blocks:PIXELS`
            holds out squares with sides of so many pixels, with a gap around them as wide as the model sees;
            `table:FILE.csv` has the columns `name`, and `group` (held out together) or `split` (train or test); pixels
            that tiles of both sides share do not train. None: `subjects`, and `blocks` if the labelled pixels are all
            of one scene.
        validation: the share of subjects, blocks or groups to hold out, or the names of subjects, scenes or groups.
        fold: `K/N` holds out the K-th of N parts of the subjects, blocks or groups, K from 1; each is held out once.
        seed: seed of the draw.
        window: the side of the square around each pixel that the model sees; None: it sees whole subjects.

    Raises:
        ValueError: the split is not one of these, does not fit the labels, or leaves a side empty.
        FileNotFoundError: there is no such table.
    """
    check_split(subjects, labels, split, validation=validation, fold=fold)
    labels = valid_labels(subjects, labels, window)
    if split is None:
        split = default_split(subjects, labels, validation, window)
    kind, _, value = split.partition(":")
    part = _fold(fold)
    if kind in ("subjects", "table"):
        return _divide_subjects(subjects, labels, split, validation, part, seed)
    if kind == "pixels":
        share = _share(split, value)
        roles = draw_pixels(scene_targets(subjects, labels), len(labels.classes), share, seed)
        drawn = divide_by_role(subjects, labels, roles, f"{share:.4g} of the pixels of each class train", window)
        return dataclasses.replace(drawn, neighbours=True)
    assert isinstance(validation, float)
    windows: dict[str, list[tuple[slice, slice]]] = {}
    for index in labels.counts if window is None else ():
        whole = (slice(None), slice(None))
        places = subjects.positions[index].window.slices if subjects.positions else whole
        windows.setdefault(scene_names(subjects)[index], []).append(places)
    targets, classes = scene_targets(subjects, labels), len(labels.classes)
    roles, text = draw_blocks(
        targets, classes, int(value), part or validation, seed, windows if window is None else window
    )
    divided = divide_by_role(subjects, labels, roles, text, window, apart=True)
    pixels = divided.pixels()
    advice = _less_gap(subjects, int(value), window) if pixels["gap"] > pixels["training"] else ""
    return dataclasses.replace(divided, text=divided.text + advice)


def _less_gap(subjects: Subjects, side: int, window: int | None) -> str:
    """Return what helps if blocks of `side` pixels lose many labels in the gap, as an end of a sentence, or nothing."""
    if window is not None:
        return "; larger blocks lose fewer"
    if not subjects.positions:
        return "; scenes that are cut into tiles (--tile) lose fewer"
    tile = min(place.window.height for place in subjects.positions)
    fewest = f"; blocks whose side is a multiple of the tiles' lose fewest, as in blocks:{tile}"
    return fewest if side % tile else ""


def check_split(
    subjects: Subjects,
    labels: Labels,
    split: str | None = None,
    *,
    validation: Sequence[str] | float = VALIDATION,
    fold: str | None = None,
) -> None:
    """Raise the errors of `divide` that show without the cubes: of its arguments, of groups and of tables."""
    kind, _, value = (split or "").partition(":")
    part, chosen = _fold(fold), validation != VALIDATION
    if part and chosen:
        raise ValueError("a fold and validation exclude each other: both say what is held out")
    if isinstance(validation, float) and not 0 < validation < 1:
        raise ValueError(f"validation is {validation:g}, expected a share in (0, 1), or names")
    if kind == "pixels" and part:
        raise ValueError("a fold is of subjects, blocks or groups; expected no fold with a split by pixels")
    if (kind == "pixels" or (kind == "subjects" and value)) and (part or chosen):
        raise ValueError(
            f"split is {split!r}, which says what is held out; expected no {'fold' if part else 'validation'} with it"
        )
    if kind in ("pixels", "blocks") and labels.task != "segmentation":
        raise ValueError(f"split is {split!r}, of pixels; expected subjects or table for classes of subjects")
    if kind == "masks":
        raise ValueError(f"split is {split!r}: masks hold the labels themselves, see divide_by_masks")
    if split is not None and (kind not in ("subjects", "pixels", "blocks", "table") or split in ("table", "table:")):
        raise ValueError(f"split is {split!r}, expected {KINDS}")
    if kind == "pixels":
        _share(str(split), value)
    elif kind == "blocks":
        if not re.fullmatch("[1-9][0-9]{0,8}", value):
            raise ValueError(f"split is {split!r}, expected blocks:PIXELS with the side of a block, as in blocks:32")
        if not isinstance(validation, float):
            raise ValueError(f"validation names {validation[0]!r}, expected a share of the blocks to hold out")
    elif split is not None or not isinstance(validation, float):  # of no fewer subjects than have data in their cubes
        _divide_subjects(subjects, labels, split or "subjects", validation, part, seed=0)


def default_split(
    subjects: Subjects, labels: Labels, validation: Sequence[str] | float, window: int | None = None
) -> str:
    """Return `subjects`, or `blocks:PIXELS` if the labelled pixels are all of one scene.

    Raises:
        ValueError: the model sees this one scene whole, so that blocks of it can't be kept apart.
    """
    scenes = scene_names(subjects)
    one = len({scenes[index] for index in labels.counts}) == 1
    if not one or labels.task != "segmentation" or not isinstance(validation, float):
        return "subjects"
    if window is not None:
        return f"blocks:{3 * window}"
    if len(labels.counts) == 1:
        raise ValueError(
            "one subject has labels, and the model sees it whole: cut it into tiles (--tile PIXELS), of which blocks "
            "are held out, or classify each pixel by the window around it (--task pixels)"
        )
    positions = subjects.positions
    return f"blocks:{min(positions[index].window.height for index in labels.counts)}"


def _divide_subjects(
    subjects: Subjects,
    labels: Labels,
    split: str,
    validation: Sequence[str] | float,
    fold: tuple[int, int] | None,
    seed: int,
) -> Split:
    """Return the split that holds out some subjects, or some groups of a table."""
    kind, _, value = split.partition(":")
    if kind == "table":
        return _by_table(subjects, labels, Path(value), validation, fold, seed)
    held = _share(split, value) if value else validation
    scenes = scene_names(subjects)
    return _by_group(labels, {index: scenes[index] for index in labels.counts}, held, fold, seed, "subjects")


def _by_group(
    labels: Labels,
    groups: Mapping[int, str],
    validation: Sequence[str] | float,
    fold: tuple[int, int] | None,
    seed: int,
    what: str,
) -> Split:
    """Hold out some of the groups: subject number -> group."""
    names = sorted(set(groups.values()))
    drawn = np.random.default_rng(seed).permutation(names).tolist()
    if not isinstance(validation, float):
        held = set(validation)
        if unknown := sorted(held - set(names)):
            known = "labelled subjects or scenes" if what == "subjects" else what
            if labels.task == "segmentation":
                known += " (labels on nodata do not count)"
            raise ValueError(
                f"validation names {unknown[0]!r}, expected names of {known}, such as {names[0]!r}"
                if names
                else f"validation names {unknown[0]!r}, and there are no {known}"
            )
    elif fold:
        if fold[1] > len(names):
            raise ValueError(f"the fold is {fold[0]}/{fold[1]}, expected at most as many parts as {len(names)} {what}")
        held = set(drawn[fold[0] - 1 :: fold[1]])
    else:
        held = set(drawn[: max(1, round(validation * len(names)))])
    held_out = [index for index, group in groups.items() if group in held]
    training = [index for index, group in groups.items() if group not in held]
    if not training or not held_out:
        raise ValueError(
            f"{len(training)} subjects are left to train with, {len(held_out)} to validate with; expected at least one"
        )
    text = f"{len(held)} of {len(names)} {what} held out"
    return Split(labels.only(training), labels.only(held_out), text)


def _by_table(
    subjects: Subjects,
    labels: Labels,
    path: Path,
    validation: Sequence[str] | float,
    fold: tuple[int, int] | None,
    seed: int,
) -> Split:
    scenes = scene_names(subjects)
    column, table = read_table(path, {*subjects.names, *scenes}, "group", "split")
    groups = {}
    for index in labels.counts:
        name = subjects.names[index]
        group = table.get(name, table.get(scenes[index]))
        if group is not None:
            groups[index] = group
    left_out = len(labels.counts) - len(groups)
    note = f"; {left_out} labelled subjects are not in {path}" if left_out else ""
    if column == "group":
        split = _by_group(labels, groups, validation, fold, seed, "groups")
        return without_shared_pixels(subjects, dataclasses.replace(split, text=split.text + note))
    if fold or validation != VALIDATION:
        raise ValueError(
            f"{path} has a column split, which holds out already; expected no fold and no validation with it"
        )
    if unknown := sorted({side for side in table.values() if side.lower() not in SIDES}):
        raise ValueError(f"{path} has the split {unknown[0]!r}, must be one of {', '.join(SIDES)}")
    sides = {side: [i for i, group in groups.items() if SIDES[group.lower()] == side] for side in (True, False)}
    if not sides[True] or not sides[False]:
        raise ValueError(f"{path} gives {len(sides[True])} labelled subjects to train, {len(sides[False])} to test")
    text = f"{len(sides[True])} subjects train and {len(sides[False])} are held out, as {path} says{note}"
    return without_shared_pixels(subjects, Split(labels.only(sides[True]), labels.only(sides[False]), text))


def _share(split: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise ValueError(f"split is {split!r}, expected a share in (0, 1), as in {split.partition(':')[0]}:0.1")
    return share


def _fold(text: str | None) -> tuple[int, int] | None:
    """Return K and N of `K/N`."""
    if text is None:
        return None
    match = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts or parts < 2:
        raise ValueError(f"fold is {text!r}, expected K/N with 1 <= K <= N and N at least 2, as in 1/5")
    return part, parts

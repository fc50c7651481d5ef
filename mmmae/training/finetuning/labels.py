"""Labels of subjects: a class each from a CSV file, or a class for each pixel from rasters of the same stems."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...data import read_cube
from ...data.georeference import find_georeference
from ...data.pairing import pair_files
from ...data.readers.formats import CONTAINER_SUFFIXES, open_arrays
from ...data.subjects import Subjects
from ...data.tiles import scene_sizes
from ...data.warp import Warp, find_warp
from .tables import read_table

UNLABELLED = -100  # target that cross_entropy ignores
IGNORE = 255  # value in a raster for pixels without a label
BOTH_SIDES = ("TR", "TE")  # arrays of files that hold labels to train and to test with, as public benchmarks name them
MOST_BYTES = 2**28  # of rasters that are kept, by each process
MOST_DIGITS = 100  # of a label that counts as a number: int() refuses thousands


class Labels:
    """The targets of the labelled subjects.

    Args:
        task: `classification` or `segmentation`.
        classes: names of the classes; class numbers in targets are places in this list.
        counts: subject number -> `[classes]`, the number of times that each class occurs in the target.
        read: function from the subject number to the target: int64 `[]`, or `[H, W]` with `UNLABELLED` for pixels
            without a label. It must pickle if workers do not fork.
        numbers: values of the classes in rasters, in the order of `classes`; None if there are none.
    """

    def __init__(
        self,
        task: str,
        classes: Sequence[str],
        counts: dict[int, Tensor],
        read: Callable[[int], Tensor],
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.task, self.classes, self.counts, self._read = task, list(classes), counts, read
        self.numbers = None if numbers is None else list(numbers)

    def only(self, chosen: Sequence[int]) -> Labels:
        """Return the labels of the subjects `chosen` only."""
        return self.with_counts({index: self.counts[index] for index in chosen})

    def with_counts(self, counts: dict[int, Tensor]) -> Labels:
        """Return the labels of the subjects in `counts`, counted so."""
        return Labels(self.task, self.classes, counts, self._read, self.numbers)

    def target(self, index: int, size: tuple[int, int] | None = None) -> Tensor:
        """Return the target of a subject: int64 `[]`, or `[*size]`, resized by the nearest pixel.

        Without a size it has that of the labels; those of a tile have the size of its window.
        """
        target = self._read(index)
        return target if target.dim() == 0 or size is None else resize_labels(target, size)


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map of whole numbers `[H, W]` by the nearest pixel.

    That is the pixel under the centre (nearest-exact), where the bilinear resizing of the cubes is centred too.
    """
    if tuple(labels.shape) == size:
        return labels
    return F.interpolate(labels[None, None].double(), size, mode="nearest-exact")[0, 0].long()


def read_class_labels(path: str | Path, subjects: Subjects) -> Labels:
    """Read a class for each subject from a CSV file with the columns `name` and `label`.

    A tile has the label of its own name, or else that of its scene. The classes are the labels that occur, sorted as
    numbers if all are whole numbers, else as words.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a name is unknown or occurs twice, a label is empty, or no subject has one.
    """
    path, scenes = Path(path), scene_names(subjects)
    _, by_name = read_table(path, {*subjects.names, *scenes}, "label")
    labels = {
        index: by_name[name if name in by_name else scene]
        for index, (name, scene) in enumerate(zip(subjects.names, scenes, strict=True))
        if name in by_name or scene in by_name
    }
    if not labels:
        raise ValueError(f"{path} has a label for none of the subjects")
    classes = sorted(set(labels.values()), key=_order(set(labels.values())))
    numbers = {index: classes.index(label) for index, label in labels.items()}
    counts = {index: F.one_hot(torch.tensor(number), len(classes)) for index, number in numbers.items()}
    return Labels("classification", classes, counts, functools.partial(_class_target, numbers))


def read_mask_labels(
    folder: str | Path, subjects: Subjects, *, ignore: int = IGNORE, names: Sequence[str] | None = None
) -> Labels:
    """Read a class for each pixel from rasters whose stems are the subjects' names.

    Every file is read here for its classes, and again when a target is used.

    Args:
        folder: folder of rasters of whole numbers in one band, in any format of `read_cube`; or the raster of the only
            scene.
        subjects: a tile uses its window of the scene's raster. A raster of another size than its cube is resized to the
            cube's, by the nearest pixel; its aspect must be that of the cube. Where both tell where they lie, a raster
            of another extent, orientation or reference system is resampled to the nearest pixel on the grid of the
            cube.
        ignore: the number that means "not labelled", besides the nodata that a file declares.
        names: names of the classes, in ascending order of their numbers; None uses the numbers.

    Raises:
        ValueError: the folder or a file can't be read, a value is not a whole number, a raster does not fit its scene,
            the number of classes is not that of `names`, or no subject has a label.
    """
    return read_masks_alike([folder], subjects, ignore=ignore, names=names)[0]


def read_masks_alike(
    folders: Sequence[str | Path],
    subjects: Subjects,
    *,
    ignore: int = IGNORE,
    names: Sequence[str] | None = None,
    arrays: Sequence[str | None] | None = None,
) -> list[Labels]:
    """Read labels as `read_mask_labels` does from several folders, whose classes are those of all of them.

    `arrays` names the array to read of each one's files, for those that hold several; None: the only one.
    """
    read: list[tuple[_Masks, dict[int, dict[int, int]]]] = []
    for folder, array in zip(folders, arrays or [None] * len(folders), strict=True):
        masks = _Masks(_mask_files(Path(folder), subjects), subjects, ignore, array)
        found: dict[int, dict[int, int]] = {}
        for index, scene in enumerate(masks.scenes):
            if scene in masks.files:
                values, counts = np.unique(masks.raw(index).numpy(), return_counts=True)
                found[index] = {int(v): int(c) for v, c in zip(values, counts, strict=True) if v != UNLABELLED}
        if not any(found.values()):
            raise ValueError(
                f"{name_array(folder, array)} has labels for none of the subjects, such as {subjects.names[0]!r}"
            )
        read.append((masks, found))
    numbers = sorted(set().union(*(count for _, found in read for count in found.values())))
    if names is not None and len(names) != len(numbers):
        raise ValueError(f"there are {len(names)} names of classes, expected {len(numbers)}, for the labels {numbers}")
    classes = [str(number) for number in numbers] if names is None else list(names)
    labels = []
    for masks, found in read:
        counted = {i: torch.tensor([count.get(number, 0) for number in numbers]) for i, count in found.items() if count}
        target = functools.partial(masks.target, torch.tensor(numbers))
        labels.append(Labels("segmentation", classes, counted, target, numbers))
    return labels


def name_array(path: str | Path, array: str | None) -> str:
    """Return a path for messages, with the array that is read of its file if one is named."""
    return str(path) if array is None else f"{path}, array {array}"


def scene_names(subjects: Subjects) -> list[str]:
    """Return the scene of each subject if they are tiles, else their names."""
    return [position.scene for position in subjects.positions] or list(subjects.names)


def scene_targets(subjects: Subjects, labels: Labels) -> dict[str, Tensor]:
    """Return scene -> target int64 `[H, W]` of the labelled scenes, each put together of its tiles if it has any."""
    return dict(_scene_targets(subjects, labels))


def _scene_targets(subjects: Subjects, labels: Labels) -> Iterator[tuple[str, Tensor]]:
    """Yield each labelled scene and its target, see `scene_targets`; none is kept."""
    scenes, sizes = scene_names(subjects), scene_sizes(subjects.positions)
    members: dict[str, list[int]] = {}
    for index in labels.counts:
        members.setdefault(scenes[index], []).append(index)
    for scene, indices in members.items():
        if not subjects.positions:
            yield scene, labels.target(indices[0])
            continue
        whole = torch.full(sizes[scene], UNLABELLED)
        for index in indices:
            window = subjects.positions[index].window
            whole[window.slices] = resize_labels(labels.target(index), (window.height, window.width))
        yield scene, whole


def count_labels(subjects: Subjects, labels: Labels) -> list[int]:
    """Return how many labels each class has; a pixel that several tiles of a scene share counts once."""
    counts: Iterable[Tensor] = labels.counts.values()
    if labels.task == "segmentation" and subjects.positions:
        targets = (target for _, target in _scene_targets(subjects, labels))
        counts = (torch.bincount(target[target != UNLABELLED], minlength=len(labels.classes)) for target in targets)
    return sum(counts, torch.zeros(len(labels.classes), dtype=torch.int64)).tolist()


class _Masks:
    """Reads rasters of classes; keeps those that were used last, because tiles share them, and visits are shuffled."""

    def __init__(self, files: dict[str, Path], subjects: Subjects, ignore: int, array: str | None = None) -> None:
        self.files, self.ignore, self.array = files, ignore, array
        self.names, self.scenes = list(subjects.names), scene_names(subjects)
        self.cube_size, self.subject_files = subjects.cube_size, subjects.files
        self.positions, self.sizes = subjects.positions, scene_sizes(subjects.positions)
        self.kept: OrderedDict[Path, Tensor] = OrderedDict()  # the one used last at the end
        self.warps: dict[str, Warp | None] = {}  # scene -> how its raster is resampled

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": OrderedDict()}  # workers read for themselves

    def raw(self, index: int) -> Tensor:
        """Read the numbers `[H, W]` in the raster of a subject, or in its tile; `UNLABELLED` where there is none."""
        mask = self._raster(index)
        return (mask[self.positions[index].window.slices] if self.positions else mask).long().contiguous()

    def _raster(self, index: int) -> Tensor:
        """Return the raster of a subject's scene in its smallest type, and keep it within `MOST_BYTES` of rasters."""
        scene = self.scenes[index]
        path = self.files[scene]
        if path in self.kept:
            self.kept.move_to_end(path)
            return self.kept[path]
        if scene not in self.warps:
            self.warps[scene] = self._find_warp(path, index)
        mask = _read_mask(path, self.ignore, self.warps[scene], self.array)
        self._check_aspect(path, mask, index)
        size, most = self._size(index), int(mask.max())
        dtype = next(
            dtype for dtype in (torch.int8, torch.int16, torch.int32, torch.int64) if most <= torch.iinfo(dtype).max
        )
        self.kept[path] = mask = (mask if size is None else resize_labels(mask, size)).to(dtype)
        while len(self.kept) > 1 and sum(kept.nbytes for kept in self.kept.values()) > MOST_BYTES:
            self.kept.popitem(last=False)
        return mask

    def _find_warp(self, path: Path, index: int) -> Warp | None:
        """Return how a raster is resampled onto the grid of its scene; None if it is read as it is."""
        cube = self.subject_files(index).get("hsi")
        place, grid = (None if file is None else find_georeference(file) for file in (path, cube))
        if place is None or grid is None or self._size(index) not in (None, grid.size):
            return None
        try:
            return find_warp(place, grid, sizes_fit=place.height * grid.width == place.width * grid.height)
        except ValueError as error:
            raise ValueError(f"{path}, subject {self.names[index]!r}: {error}") from error

    def _check_aspect(self, path: Path, mask: Tensor, index: int) -> None:
        height, width = self._size(index) or mask.shape
        if mask.shape[0] * width != mask.shape[1] * height:
            raise ValueError(
                f"{name_array(path, self.array)}, subject {self.names[index]!r}: the labels are {mask.shape[0]} x "
                f"{mask.shape[1]}, the cube is {height} x {width}; expected the same aspect"
            )

    def _size(self, index: int) -> tuple[int, int] | None:
        """Return height and width of a subject's scene, if they are known."""
        return self.sizes.get(self.scenes[index]) or self.cube_size(index)

    def target(self, numbers: Tensor, index: int) -> Tensor:
        """Return the target `[H, W]` of a subject: places of its numbers in the ascending `numbers` of all classes."""
        mask = self.raw(index)
        return torch.searchsorted(numbers, mask).masked_fill(mask == UNLABELLED, UNLABELLED)


def _mask_files(path: Path, subjects: Subjects) -> dict[str, Path]:
    """Return scene -> raster of a folder, or of the one file that belongs to the only scene."""
    if not path.is_file():
        return pair_files(path, {})[0].files
    scenes = sorted(set(scene_names(subjects)))
    if len(scenes) > 1:
        raise ValueError(
            f"{path} is one file, and there are {len(scenes)} scenes; expected a folder of rasters with their names, "
            f"such as {scenes[0]!r}, or the file of one cube for --hsi"
        )
    return {scenes[0]: path}


def _class_target(numbers: dict[int, int], index: int) -> Tensor:
    return torch.tensor(numbers[index])


def _order(labels: set[str]) -> Callable[[str], tuple[int, str]]:
    numbers = all(label.removeprefix("-").isdecimal() and len(label) <= MOST_DIGITS for label in labels)
    return lambda label: (int(label) if numbers else 0, label)


def _read_mask(path: Path, ignore: int, warp: Warp | None, array: str | None) -> Tensor:
    read = functools.partial(read_cube, path, classes=True, dataset=array)
    try:
        cube = read() if warp is None else warp.read(lambda part: read(window=part), nearest=True)
    except ValueError as error:
        if "(--" in str(error) or "by --" in str(error):
            raise ValueError(f"{error}; files of labels take no such option, write them anew") from error
        raise
    name = name_array(path, array)
    if len(cube.values) != 1:
        hint = f"; --split masks:{path} without --labels reads its arrays TR and TE" if _has_both_sides(path) else ""
        raise ValueError(f"{name} has {len(cube.values)} bands, expected one band of classes{hint}")
    values, unknown = cube.values[0], cube.nodata[0] | (cube.values[0] == ignore)
    if not torch.equal(values, values.round()) or bool((values[~unknown] < 0).any()):
        raise ValueError(
            f"{name} has values that are not classes, expected whole numbers >= 0, and {ignore} where there is no label"
        )
    return values.long().masked_fill(unknown, UNLABELLED)


def _has_both_sides(path: Path) -> bool:
    """Return whether a file has the arrays that hold labels to train with and labels to test with."""
    if path.suffix.lower() not in CONTAINER_SUFFIXES:
        return False
    with open_arrays(path) as arrays:
        return {*BOTH_SIDES} <= {*arrays}

"""Maps of scenes, or a class for each subject, by fine-tuned models."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.readers.windows import Window
from ...data.subjects import Subjects
from ...data.tiles import Position, fit, scene_sizes
from ...data.windows import reflect_windows
from ...files import check_can_write, file_for, write_atomically
from ...model.encoder import LinearClassifier
from ...model.finetuned import FinetunedModel
from ...model.heads import SegmentationModel
from ...model.pixels import PixelClassifier
from ...precision import Precision, autocast, resolve_precision
from ...text import cell
from .batches import batches, check_options, check_outputs, first_subjects
from .class_maps import Classes, map_files, write_map
from .encode import usable_device
from .rasters import find_place
from .stitching import Tile, stitch

PIXELS = 64  # that a batch has for each tile, where each pixel has a window of its own

Forward: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]  # samples and their names -> logits


def predict_scenes(
    model: SegmentationModel,
    classes: Sequence[str],
    subjects: Subjects,
    out: str | Path,
    *,
    values: Sequence[int] | None = None,
    window: int | None = None,
    probabilities: bool = False,
    batch: int = 8,
    workers: int = 0,
    device: str = "cpu",
    precision: Precision = "auto",
) -> list[Path]:
    """Write a map of classes of each scene, as `NAME.tif`, with a picture, `NAME.png`.

    Scenes are read, predicted and written tile by tile, and as many rows are held as a tile has, so that they may have
    any size. Logits of overlapping tiles are averaged by `window_weights`. A map has the georeference of its cube, a
    colour table, and the names of its classes as tags and, for GDAL and QGIS, in `NAME.tif.aux.xml`. Each file is
    written atomically.

    Args:
        model: moved to `device` and set to evaluation mode.
        classes: names of the classes, in the order of the logits.
        subjects: scenes, or tiles of scenes in their own size (`image_size=None`); with the encoder's bands.
        out: the folder; other files in it stay.
        values: of the classes in the map, below 65,535; None numbers them from 0. The largest value of the map's type,
            255 or 65,535, marks pixels where the cube has no data.
        window: side in pixels of the tiles; smaller ones, of scenes smaller than a tile, are continued by reflection.
            None: all are resized to the model's size, and their logits to that of the cube or tile. Of a
            `PixelClassifier`, the side of the window around each pixel, which tiles must share but for one pixel;
            None: the encoder's image_size.
        probabilities: also write the probability of each class, as the float32 bands of `NAME_probabilities.tif`, NaN
            where the cube has no data.
        batch: tiles a forward pass, or 64 times as many pixels with a window each.
        workers: processes that read data.
        device: the device to compute on.
        precision: `32`, or autocast to `bf16` or `16`; `auto`: what `mmmae.precision.best_precision` says.

    Returns:
        The maps.

    Raises:
        ValueError: an argument is not allowed, subjects and model do not fit, a file of the subjects would be
            replaced, or a logit is not finite.
        OSError: a file can't be read or written.
    """
    out = Path(out)
    forward = _check(model, subjects, classes, batch, workers, device, precision)
    chosen = Classes.of(classes, values)
    sizes = scene_sizes(subjects.positions)
    firsts = first_subjects(subjects)
    paths = {scene: file_for(out, scene, ".tif") for scene in firsts}
    if probabilities and (twice := next((scene for scene in firsts if f"{scene}_probabilities" in firsts), None)):
        raise ValueError(f"the probabilities of {twice!r} would have the name of another map; rename a scene")
    check_outputs(subjects, [file for path in paths.values() for file in map_files(path, probabilities=probabilities)])
    check_can_write(out)
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PixelClassifier):
        tiles = _pixels(forward, subjects, window or model.encoder.config.image_size, len(classes), batch, workers)
    else:
        tiles = _tiles(forward, subjects, window, batch, workers)
    for scene, group in itertools.groupby(tiles, key=lambda tile: tile.scene):
        rest = iter(group)
        first, source = next(rest), firsts[scene]
        size = sizes.get(scene) or (first.window.height, first.window.width)
        place = find_place(subjects.files(source).get("hsi"), size, subjects.cube_size(source))
        rows = stitch(itertools.chain([first], rest), len(classes), size[1])
        write_map(paths[scene], rows, size, chosen, place, probabilities=probabilities)  # before the next group
    return list(paths.values())


def predict_subjects(
    model: LinearClassifier,
    classes: Sequence[str],
    subjects: Subjects,
    out: str | Path,
    *,
    batch: int = 8,
    workers: int = 0,
    device: str = "cpu",
    precision: Precision = "auto",
) -> list[str]:
    """Write the class of each subject into a CSV file, with the probability of each class.

    Args:
        model: moved to `device` and set to evaluation mode.
        classes: names of the classes, in the order of the logits.
        subjects: with the encoder's bands.
        out: the file, with the columns `name`, `class`, and `probability of CLASS` for each class.
        batch, workers, device, precision: as for `predict_scenes`.

    Returns:
        The class of each subject.

    Raises:
        ValueError: an argument is not allowed, subjects and model do not fit, or a logit is not finite.
        OSError: a file can't be read or written.
    """
    out = Path(out)
    forward = _check(model, subjects, classes, batch, workers, device, precision)
    check_outputs(subjects, [out])
    check_can_write(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    found: list[str] = []

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "class", *(f"probability of {cell(name)}" for name in classes)])
            for samples in batches(subjects, batch, workers, label="predicting"):
                logits = forward(samples.hsi, samples.names)
                for name, row in zip(samples.names, logits.softmax(1).tolist(), strict=True):
                    found.append(classes[row.index(max(row))])
                    writer.writerow([cell(name), cell(found[-1]), *(f"{probability:.6f}" for probability in row)])

    write_atomically(out, write)
    return found


def _check(
    model: FinetunedModel,
    subjects: Subjects,
    classes: Sequence[str],
    batch: int,
    workers: int,
    device: str,
    precision: Precision,
) -> Forward:
    """Raise ValueError for arguments that do not fit; return the model as a function."""
    config = model.encoder.config
    check_options(config, subjects, precision, batch=batch, workers=workers)
    if len(classes) == 0:
        raise ValueError("there are no classes, expected at least one")
    place = usable_device(device)
    chosen = resolve_precision(precision, place, config.dim)
    model = model.eval().to(place)

    def forward(hsi: Tensor, names: Sequence[str]) -> Tensor:
        """Return logits, float32 on the CPU."""
        with autocast(chosen, place), torch.inference_mode():
            logits: Tensor = model(hsi.to(place)).float()
        if logits.dim() == 4 and logits.shape[-2:] != hsi.shape[-2:]:
            logits = F.interpolate(logits, hsi.shape[-2:], mode="bilinear", align_corners=False)
        logits = logits.cpu()
        finite = logits.flatten(1).isfinite().all(1)
        if not finite.all():
            name = names[int((~finite).nonzero()[0])]
            raise ValueError(f"subject {name!r}: its logits are not finite; try --precision 32")
        return logits

    return forward


def _tiles(forward: Forward, subjects: Subjects, window: int | None, batch: int, workers: int) -> Iterator[Tile]:
    """Yield the logits of each tile, or of each subject that is a scene of its own, in their order."""
    positions, numbers = iter(subjects.positions), itertools.count()
    for samples in batches(subjects, batch, workers, label="predicting", window=window):
        predicted = forward(samples.hsi, samples.names)
        for name, valid, logits in zip(samples.names, samples.valid, predicted, strict=True):
            size = subjects.cube_size(next(numbers)) if window is None else None
            place = next(positions, None) or Position(name, Window(0, 0, *(size or valid.shape)))
            _, (_, _, height, width) = place
            if window is None:
                yield Tile(*place, fit(logits, place.window), fit(valid[None], place.window)[0] >= 0.5)
            else:
                yield Tile(*place, logits[:, :height, :width], valid[:height, :width])


def _pixels(
    forward: Forward, subjects: Subjects, window: int, classes: int, batch: int, workers: int
) -> Iterator[Tile]:
    """Yield the logits of the pixels whose windows lie in a tile, or reach beyond the scene, where it is reflected.

    Pixels of which the tiles above or on the left have yielded the logits are left out.
    """
    positions, sizes = iter(subjects.positions), scene_sizes(subjects.positions)
    starts: dict[str, tuple[set[int], set[int]]] = {}
    for scene, place in subjects.positions:
        for known, start in zip(starts.setdefault(scene, (set(), set())), (place.row, place.column), strict=True):
            known.add(start)
    half = window // 2
    for samples in batches(subjects, 1, workers, label="predicting"):
        (name,), (hsi,), (valid,) = samples.names, samples.hsi, samples.valid
        scene, (row, column, height, width) = next(positions, None) or Position(name, Window(0, 0, *valid.shape))
        total = sizes.get(scene, (height, width))
        rows, columns = starts.get(scene, ({row}, {column}))
        top, bottom = _inner(rows, row, height, total[0], half)
        left, right = _inner(columns, column, width, total[1], half)
        if top >= bottom or left >= right:
            continue
        inner = valid[top:bottom, left:right]
        logits = torch.zeros(classes, *inner.shape)
        for places in inner.nonzero().split(batch * PIXELS):  # [n, 2]
            down, across = places.T
            squares = reflect_windows(hsi, down + top, across + left, window)
            logits[:, down, across] = forward(squares, [name] * len(squares)).T
        yield Tile(scene, Window(row + top, column + left, *inner.shape), logits, inner)


def _inner(starts: Collection[int], start: int, length: int, total: int, half: int) -> tuple[int, int]:
    """Return the first pixel to predict along an axis of a tile, and the one after the last.

    Args:
        starts: where the tiles of the scene start.
        start, length: of this tile.
        total: length of the scene.
        half: pixels of a window on either side of its centre.
    """
    done = max((other + length - half for other in starts if other < start), default=0)
    return max(half if start else 0, done - start), length if start + length == total else length - half

"""Pictures of a segmentation: input in false colours, label, prediction, and where they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from ...data import Sample
from ...data.readers.windows import Window
from ...data.subjects import Subjects
from ...data.tiles import Mosaic, Position, scene_sizes
from ...files import file_for
from ...precision import autocast
from ...text import figure_text
from ..bar import progress_bar
from ..pictures import GREY, contrast, save_figure, show, spread
from .labelled import labelled
from .labels import UNLABELLED, Labels, resize_labels, scene_names
from .pixel_splits import GAP, TEST
from .pixels import predict_pixels

RIGHT, WRONG = (0.85, 0.9, 0.85), (0.8, 0.1, 0.1)
ROLES = [(GREY,) * 3, (1.0, 0.6, 0.0), (0.1, 0.35, 0.8), (0.0, 0.0, 0.0)]  # colours of NONE, TRAIN, TEST and GAP
MOST_TILES = 400  # of a scene that is drawn whole; more would be more pixels than a picture shows


def write_maps(
    model: nn.Module,
    subjects: Subjects,
    labels: Labels,
    chosen: Sequence[int],
    folder: Path,
    *,
    count: int,
    rgb: tuple[int, int, int] | None = None,
    roles: Mapping[str, Tensor] | None = None,
    window: int | None = None,
    precision: str = "32",
) -> None:
    """Write pictures `NAME.png` of the first `count` subjects, or scenes, among those `chosen`.

    The tiles of a scene are put together, faded into each other where they overlap; if there are more than 400, they
    are drawn one by one.

    Args:
        model: in evaluation mode.
        subjects, labels: the subjects and their labels.
        chosen: numbers of the subjects to draw.
        folder: made if it does not exist.
        count: largest number of pictures.
        rgb: bands shown as red, green and blue; None spreads three over the spectrum.
        roles: scene -> roles of its pixels, if pixels are held out; such scenes are drawn whole, and errors are those
            of the pixels to test with.
        window: side of the windows that the model classifies the centres of; None: it classifies whole subjects.
        precision: `32`, or autocast to `bf16` or `16`.
    """
    folder.mkdir(exist_ok=True)
    scenes, roles = scene_names(subjects), roles or {}
    drawn = {scenes[index] for index in chosen}
    groups: dict[str, list[int]] = {}
    for index in range(len(scenes)) if roles else chosen:
        if scenes[index] in drawn:
            groups.setdefault(scenes[index], []).append(index)
    pictures: list[tuple[str, list[int]]] = []
    for scene, indices in groups.items():
        whole = len(indices) <= MOST_TILES
        pictures += [(scene, indices)] if whole else [(subjects.names[index], [index]) for index in indices]
    pictures = pictures[:count]
    bands = list(rgb or spread(subjects.bands))
    shown = [index for _, indices in pictures for index in indices]
    steps = len(shown) if window is None else sum(labels.target(index).numel() for index in shown)
    with progress_bar("drawing maps", steps) as done:
        for name, indices in pictures:
            picture, target, predicted, valid = _whole(
                subjects, labels, indices, bands, lambda sample: _predict(model, sample, window, precision, done)
            )
            role = roles.get(scenes[indices[0]])
            if role is not None and len(indices) == 1 and subjects.positions:
                role = role[subjects.positions[indices[0]].window.slices]
            role = None if role is None else resize_labels(role.long(), (target.shape[0], target.shape[1]))
            figure = draw_map(name, picture, target, predicted, valid, labels.classes, bands, role)
            save_figure(figure, file_for(folder, name, ".png"))


def draw_map(
    name: str,
    picture: Tensor,
    target: Tensor,
    predicted: Tensor,
    valid: Tensor,
    classes: Sequence[str],
    bands: Sequence[int],
    roles: Tensor | None = None,
) -> Figure:
    """Draw one subject, or one scene put together of tiles.

    Args:
        name: the title.
        picture: `[3, H, W]`, three normalised bands.
        target: int64 `[H, W]`, `UNLABELLED` where there is no label; drawn grey.
        predicted: int64 `[H, W]`.
        valid: bool `[H, W]`; predictions for other pixels are drawn grey.
        classes: names of the classes.
        bands: the numbers of the three bands.
        roles: int64 `[H, W]`, roles of the pixels; None: all test.
    """
    labelled = target != UNLABELLED
    low, high = contrast(picture, valid)
    colours = class_colours(len(classes))
    tested = labelled if roles is None else labelled & (roles == TEST)
    wrong = (predicted != target) & tested
    error = np.where(wrong[..., None].numpy(), WRONG, RIGHT)
    error[~tested.numpy()] = GREY
    figure = Figure(figsize=(14 if roles is None else 17, 4.2), layout="constrained")
    panels = figure.subplots(1, 4 if roles is None else 5)
    colour = (((picture - low) / (high - low)).clamp(0, 1) * valid).permute(1, 2, 0)
    show(panels[0], colour.numpy(), f"input, bands {', '.join(map(str, bands))}")
    given = np.where(labelled[..., None].numpy(), colours[target.clamp(min=0).numpy()], GREY)
    show(panels[1], given, "label")
    found = np.where(valid[..., None].numpy(), colours[predicted.numpy()], GREY)
    show(panels[2], found, "prediction")
    share = float(wrong.sum()) / max(1, int(tested.sum()))
    show(panels[3], error, f"error: {share:.1%} of the {'labelled' if roles is None else 'test'} pixels")
    if roles is not None:
        title = "[orange] train, [blue] test" + (", [black] gap" if bool((roles == GAP).any()) else "")
        show(panels[4], np.asarray(ROLES)[roles.numpy()], title.replace("[", "").replace("]", ":"))
    present = sorted({*target[labelled].tolist(), *predicted[valid].tolist()})
    handles = [Patch(color=colours[number], label=figure_text(classes[number])) for number in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, max(1, len(handles))), frameon=False)
    figure.suptitle(figure_text(name))
    return figure


def class_colours(classes: int) -> np.ndarray:
    """Return a colour for each class `[classes, 3]`, none of them grey; the same in every picture."""
    if classes > 18:
        return np.asarray(colormaps["gist_ncar"](np.linspace(0.05, 0.95, classes)))[:, :3]
    palette = np.asarray(colormaps["tab20"](range(20)))[:, :3]
    dark_then_light = [*range(0, 20, 2), *range(1, 20, 2)]
    return palette[[number for number in dark_then_light if number not in (14, 15)][:classes]]  # these are grey


def _predict(
    model: nn.Module, sample: Sample, window: int | None, precision: str, done: Callable[[int], object]
) -> Tensor:
    """Return logits `[classes, H, W]`, float32 on the CPU."""
    if window is not None:
        return predict_pixels(model, sample.hsi, window, precision=precision, done=done)
    device = next(model.parameters()).device
    with torch.inference_mode(), autocast(precision, device):
        logits: Tensor = model(sample.hsi[None].to(device))[0].float().cpu()
    done(1)
    return logits


def _whole(
    subjects: Subjects,
    labels: Labels,
    indices: Sequence[int],
    bands: Sequence[int],
    predict: Callable[[Sample], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return picture `[3, H, W]`, target `[H, W]`, classes `[H, W]` and valid `[H, W]` of a subject or scene.

    Samples are read one at a time, and only the drawn bands of them are kept.
    """
    windows = [_window(subjects, labels, index) for index in indices]
    if len(indices) == 1:
        windows = [Window(0, 0, windows[0].height, windows[0].width)]
    size = scene_sizes(Position("", window) for window in windows)[""]
    cpu = torch.device("cpu")
    mosaics: list[Mosaic] = []
    whole = torch.full(size, UNLABELLED)
    for index, window in zip(indices, windows, strict=True):
        sample = subjects[index]
        parts = (sample.hsi[0, list(bands)], sample.valid[None].float(), predict(sample))
        if not mosaics:
            mosaics = [Mosaic(len(part), size, cpu, weighted=part is parts[2]) for part in parts]
        for mosaic, part in zip(mosaics, parts, strict=True):
            mosaic.add(part, window)
        if index in labels.counts:
            known = labelled(sample, labels, index, (window.height, window.width)).target
            target = whole[window.slices]
            target.copy_(torch.where(known == UNLABELLED, target, known))
    picture, valid, logits = (mosaic.mean() for mosaic in mosaics)
    return picture, whole, logits.argmax(0), valid[0] >= 0.5


def _window(subjects: Subjects, labels: Labels, index: int) -> Window:
    """Return the window of a tile, or that of all of a scene."""
    return subjects.positions[index].window if subjects.positions else Window(0, 0, *labels.target(index).shape)

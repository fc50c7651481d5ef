"""Pictures of a segmentation: input in false colours, label, prediction, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.subjects import Subjects
from ...data.tiles import untile
from ...files import file_for
from ...text import figure_text
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
    for name, indices in pictures[:count]:
        hsi, target, logits, valid = _whole(model, subjects, labels, indices, window)
        role = roles.get(scenes[indices[0]])
        if role is not None and len(indices) == 1 and subjects.positions:
            role = role[subjects.positions[indices[0]].window.slices]
        role = None if role is None else resize_labels(role.long(), (target.shape[0], target.shape[1]))
        figure = draw_map(name, hsi, target, logits.argmax(0), valid, labels.classes, rgb, role)
        save_figure(figure, file_for(folder, name, ".png"))


def draw_map(
    name: str,
    hsi: Tensor,
    target: Tensor,
    predicted: Tensor,
    valid: Tensor,
    classes: Sequence[str],
    rgb: tuple[int, int, int] | None = None,
    roles: Tensor | None = None,
) -> Figure:
    """Draw one subject, or one scene put together of tiles.

    Args:
        name: the title.
        hsi: `[T, H, W]`, normalised.
        target: int64 `[H, W]`, `UNLABELLED` where there is no label; drawn grey.
        predicted: int64 `[H, W]`.
        valid: bool `[H, W]`; predictions for other pixels are drawn grey.
        classes: names of the classes.
        rgb: bands shown as red, green and blue; None spreads three over the spectrum.
        roles: int64 `[H, W]`, roles of the pixels; None: all test.
    """
    bands = list(rgb or spread(len(hsi)))
    labelled = target != UNLABELLED
    low, high = contrast(hsi[bands], valid)
    colours = class_colours(len(classes))
    tested = labelled if roles is None else labelled & (roles == TEST)
    wrong = (predicted != target) & tested
    error = np.where(wrong[..., None].numpy(), WRONG, RIGHT)
    error[~tested.numpy()] = GREY
    figure = Figure(figsize=(14 if roles is None else 17, 4.2), layout="constrained")
    panels = figure.subplots(1, 4 if roles is None else 5)
    picture = (((hsi[bands] - low) / (high - low)).clamp(0, 1) * valid).permute(1, 2, 0)
    show(panels[0], picture.numpy(), f"input, bands {', '.join(map(str, bands))}")
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


def _whole(
    model: nn.Module, subjects: Subjects, labels: Labels, indices: Sequence[int], window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cube `[T, H, W]`, target `[H, W]`, logits `[classes, H, W]` and valid `[H, W]` of a subject or scene."""
    samples = [subjects[index] for index in indices]
    targets = [
        labelled(sample, labels, index).target if index in labels.counts else torch.full(sample.valid.shape, UNLABELLED)
        for sample, index in zip(samples, indices, strict=True)
    ]
    device = next(model.parameters()).device
    if window is not None:
        return samples[0].hsi[0], targets[0], predict_pixels(model, samples[0].hsi, window), samples[0].valid
    with torch.inference_mode():
        logits = [model(sample.hsi[None].to(device))[0].cpu() for sample in samples]
    if len(indices) == 1:
        return samples[0].hsi[0], targets[0], logits[0], samples[0].valid
    places = [subjects.positions[index] for index in indices]

    def together(tiles: Sequence[Tensor], *, weighted: bool = False) -> Tensor:
        return next(iter(untile(tiles, places, weighted=weighted).values()))

    known = [F.one_hot(target.clamp(min=0) + (target >= 0), len(labels.classes) + 1) for target in targets]
    target = together([one_hot.permute(2, 0, 1) for one_hot in known]).argmax(0) - 1
    valid = together([sample.valid[None].float() for sample in samples])[0] >= 0.5
    cube = together([sample.hsi[0] for sample in samples])
    return cube, target.masked_fill(target < 0, UNLABELLED), together(logits, weighted=True), valid

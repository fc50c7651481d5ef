"""Scores of a classifier: accuracies, kappa, F1 and IoU, all from the confusion matrix."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from ...data.readers.windows import Window
from ...data.tiles import Mosaic, Position, fit, scene_sizes
from ...files import write_atomically
from ...text import cell, figure_text
from ..pictures import save_figure
from .labels import UNLABELLED, resize_labels

MOST_NUMBERED = 30  # classes of a confusion matrix with numbers in its cells


class Scores(nn.Module):
    """Accumulates predictions over batches, and scores all of them."""

    def __init__(self, task: str, classes: Sequence[str]) -> None:
        super().__init__()
        self.task, self.classes = task, list(classes)
        self.confusion = MulticlassConfusionMatrix(len(classes), ignore_index=UNLABELLED, validate_args=False)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add logits `[B, classes, ...]` and their targets `[B, ...]`."""
        self.confusion.update(logits.argmax(1), target)

    def reset(self) -> None:
        """Forget all predictions."""
        self.confusion.reset()

    def compute(self) -> dict[str, Any]:
        """Compute the scores of all predictions, see `compute_scores`; targets without a label do not count."""
        return compute_scores(self.confusion.compute().cpu(), self.classes, self.task)


def compute_scores(confusion: Tensor, classes: Sequence[str], task: str) -> dict[str, Any]:
    """Compute scores from a confusion matrix `[classes, classes]`, a row for each true class.

    With n the number of predictions, r the rows' and c the columns' sums and d the diagonal:

    - `accuracy`, the overall accuracy (OA): sum(d) / n.
    - `average_accuracy` (AA): the mean of d / r, the accuracies of the classes, or producer's accuracies.
    - `kappa`: (OA - e) / (1 - e) with e = sum(r * c) / n^2, the agreement by chance (Cohen, 1960; for maps Congalton,
      1991); 0 if e is 1.
    - `f1_macro`: the mean of 2 d / (r + c), the harmonic means of precision and recall (van Rijsbergen, 1979).
    - `miou`, of pixels only: the mean of d / (r + c - d), intersections over unions (Jaccard, 1912; Everingham et al.,
      2010).

    Means are over the classes that occur in the targets.

    Returns:
        These scores; `classes`, for each class by name `labelled`, `accuracy`, `f1` and `iou`; and `confusion`.
    """
    counts = confusion.double()
    true, predicted, right = counts.sum(1), counts.sum(0), counts.diagonal()
    total = float(counts.sum()) or 1.0
    ratios = {"accuracy": right / true.clamp(min=1), "f1": 2 * right / (true + predicted).clamp(min=1)}
    if task != "classification":
        ratios["iou"] = right / (true + predicted - right).clamp(min=1)
    accuracy, chance = float(right.sum()) / total, float(true @ predicted) / total**2
    occurs = true > 0
    means = {name: float(values[occurs].mean()) if occurs.any() else 0.0 for name, values in ratios.items()}
    names = {"accuracy": "average_accuracy", "f1": "f1_macro", "iou": "miou"}
    by_class = {
        name: {"labelled": int(true[i]), **{score: float(values[i]) for score, values in ratios.items()}}
        for i, name in enumerate(classes)
    }
    return {
        "accuracy": accuracy,
        "kappa": (accuracy - chance) / (1 - chance) if chance < 1 else 0.0,
        **{names[name]: mean for name, mean in means.items()},
        "classes": by_class,
        "confusion": confusion.tolist(),
    }


class SceneScores:
    """Scores a segmentation by whole scenes: each pixel of the labels counts once, also if several tiles share it.

    Args:
        scores: the scores that predictions are added to.
        positions: name of a tile -> its position. The tiles of a scene follow each other in the batches. A name that is
            not here is that of a whole scene.
    """

    def __init__(self, scores: Scores, positions: Mapping[str, Position]) -> None:
        self.scores, self.positions, self._sizes = scores, positions, scene_sizes(positions.values())
        self._scene: str | None = None
        self._seen: set[str] = set()

    def update(self, names: Sequence[str], logits: Tensor, targets: Tensor | Sequence[Tensor]) -> None:
        """Add logits `[B, classes, H, W]` and their targets `[B, h, w]`, or a list of them.

        Those of tiles are resized to the tiles' windows, and logits of a whole scene to the size of its target.

        Raises:
            ValueError: another scene's tiles lie between those of a scene.
        """
        for name, tile, target in zip(names, logits, targets, strict=True):
            if name not in self.positions:
                self.scores.update(fit(tile, Window(0, 0, *target.shape))[None], target[None])
                continue
            scene, window = self.positions[name]
            if scene != self._scene:
                self._score()
                if scene in self._seen:
                    raise ValueError(f"tile {name!r} does not follow the other tiles of scene {scene!r}")
                self._seen.add(scene)
                self._scene = scene
                self._mosaic = Mosaic(len(tile), self._sizes[scene], tile.device, weighted=True)
                self._target = torch.full(self._sizes[scene], UNLABELLED, device=target.device)
            self._mosaic.add(tile, window)
            known = resize_labels(target, (window.height, window.width))
            part = self._target[window.slices]
            part.copy_(torch.where(known == UNLABELLED, part, known))

    def finish(self) -> None:
        """Score the scene whose tiles came last; the scenes may then come again."""
        self._score()
        self._seen.clear()

    def _score(self) -> None:
        if self._scene is not None:
            self.scores.update(self._mosaic.mean()[None], self._target[None])
            self._scene = None


def main_score(task: str) -> str:
    """Return the name of the score by which the best epoch is chosen."""
    return "f1_macro" if task == "classification" else "miou"


def write_confusion(classes: Sequence[str], confusion: Sequence[Sequence[int]], out: Path) -> None:
    """Write `confusion.csv` and `confusion.png`, with a row for each true and a column for each predicted class."""

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["true \\ predicted", *map(cell, classes)])
            writer.writerows([cell(name), *row] for name, row in zip(classes, confusion, strict=True))

    write_atomically(out / "confusion.csv", write)
    save_figure(draw_confusion(classes, confusion), out / "confusion.png")


def draw_confusion(classes: Sequence[str], confusion: Sequence[Sequence[int]]) -> Figure:
    """Draw the confusion matrix: colours are shares of the true class, numbers are counts and shares.

    Of more than 30 classes it has no numbers, and the size of one of 30.
    """
    counts = torch.tensor(confusion, dtype=torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = 2.5 + 0.8 * min(len(classes), MOST_NUMBERED)
    size = min(10.0, 72 * 0.8 * MOST_NUMBERED / len(classes))  # of names in points, by which no two overlap
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    panel = figure.subplots()
    drawn = panel.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    places = range(len(classes))
    names = [figure_text(name) for name in classes]
    slant: dict[str, Any] = {"rotation": 45, "ha": "right"} if len(classes) <= MOST_NUMBERED else {"rotation": 90}
    panel.set_xticks(places, labels=names, **slant, fontsize=size)
    panel.set_yticks(places, labels=names, fontsize=size)
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    for row in places if len(classes) <= MOST_NUMBERED else ():
        for column in places:
            share = float(shares[row, column])
            text = f"{share:.0%}\n{int(counts[row, column]):,}"
            colour = "white" if share > 0.5 else "black"
            panel.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(drawn, ax=panel, shrink=0.7, label="share of the true class")
    return figure

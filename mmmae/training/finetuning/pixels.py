"""Windows around the labelled pixels of scenes, to train with and to score, and predictions for whole scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...data import Sample
from ...data.subjects import Subjects
from ...data.windows import reflect_windows
from ...precision import autocast
from .labelled import Item, flipped, labelled
from .labels import UNLABELLED, Labels
from .settings import FinetuneSettings


def check_window(window: int, subjects: Subjects, labels: Labels) -> None:
    """Raise ValueError unless windows of so many pixels can be cut around the labelled pixels of whole scenes."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}, expected an odd number of pixels, so that one of them is the centre")
    if subjects.positions:
        raise ValueError("the subjects are tiles, expected whole scenes: windows are cut around each pixel (no --tile)")
    if labels.task != "segmentation":
        raise ValueError(f"the labels are of {labels.task}, expected a class for each pixel")


class LabelledPixels(Dataset[Item]):
    """Windows around labelled pixels by visit: item v is pixel `v % len(chosen)`, flipped at random by (seed, v).

    Args:
        scenes: number of a subject -> the whole scene, which stays in memory.
        labels: of the scenes; their pixels that are not valid are left out.
        window: side of the windows, odd.
        settings: of which the seed is used.
        augmented: whether windows are flipped.

    Attributes:
        chosen: `[pixels, 4]` int64: subject, row, column and class of each pixel.
    """

    def __init__(
        self, scenes: Mapping[int, Sample], labels: Labels, window: int, settings: FinetuneSettings, *, augmented: bool
    ) -> None:
        self.scenes, self.window, self.seed, self.augmented = scenes, window, settings.seed, augmented
        found = []
        for index in labels.counts:
            target = labelled(scenes[index], labels, index).target
            places = (target != UNLABELLED).nonzero()
            rows, columns = places.unbind(1)
            found.append(torch.stack([torch.full_like(rows, index), rows, columns, target[rows, columns]], dim=1))
        self.chosen = torch.cat(found)

    def __getitem__(self, visit: int) -> Item:
        index, row, column, number = self.chosen[visit % len(self.chosen)].tolist()
        scene = self.scenes[index]
        hsi = reflect_windows(scene.hsi, torch.tensor([row]), torch.tensor([column]), self.window)[0]
        item = Item(f"{scene.name}@r{row}c{column}", hsi, torch.tensor(number))
        return flipped(item, self.seed, visit) if self.augmented else item


def predict_pixels(
    model: nn.Module,
    hsi: Tensor,
    window: int,
    batch: int = 512,
    *,
    precision: str = "32",
    done: Callable[[int], object] = lambda pixels: None,
) -> Tensor:
    """Predict all pixels of a scene by the windows around them.

    Args:
        model: takes windows `[B, 1, T, window, window]` and returns logits `[B, classes]`.
        hsi: `[1, T, H, W]`.
        window: side of the windows.
        batch: windows at a time.
        precision: `32`, or autocast to `bf16` or `16`.
        done: called with the number of pixels after each batch.

    Returns:
        Logits `[classes, H, W]`, float32 on the CPU.
    """
    height, width = hsi.shape[-2:]
    device = next(model.parameters()).device
    rows, columns = torch.cartesian_prod(torch.arange(height), torch.arange(width)).unbind(1)
    logits = []
    for places in zip(torch.split(rows, batch), torch.split(columns, batch), strict=True):
        with torch.inference_mode(), autocast(precision, device):
            logits.append(model(reflect_windows(hsi, *places, window).to(device)).float().cpu())
        done(len(places[0]))
    return torch.cat(logits).T.reshape(-1, height, width)

"""Labels of pixels that have data in their cubes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...data.subjects import Subjects
from .labels import UNLABELLED, Labels, resize_labels


class ValidLabels(Labels):
    """Labels of pixels, without those of pixels that are not valid; subjects with no other label are left out.

    Every labelled subject is read here once.

    Args:
        subjects: the subjects, or the tiles of scenes.
        labels: their labels, of the task `segmentation`.
        on_cube: whether targets are resized to the cubes' size.

    Raises:
        ValueError: no labelled pixel is valid.
    """

    def __init__(self, subjects: Subjects, labels: Labels, *, on_cube: bool) -> None:
        self.on_cube = on_cube
        sizes: dict[int, tuple[int, int]] = {}  # of the targets that are resized
        invalid: dict[int, Tensor] = {}
        counts: dict[int, Tensor] = {}
        for index in labels.counts:
            valid, target = subjects[index].valid, labels.target(index)
            if on_cube and target.shape != valid.shape:
                sizes[index] = valid.shape[0], valid.shape[1]
                target = resize_labels(target, sizes[index])
            missing = resize_labels(valid.long(), (target.shape[0], target.shape[1])) == 0
            known = target[(target != UNLABELLED) & ~missing]
            if len(known):
                counts[index] = torch.bincount(known, minlength=len(labels.classes))
                if bool(missing.any()):
                    invalid[index] = missing
        if not counts:
            raise ValueError("no labelled pixel has data in its cube; are labels and cubes those of the same scenes?")
        super().__init__(labels.task, labels.classes, counts, _Valid(labels, sizes, invalid), labels.numbers)


def valid_labels(subjects: Subjects, labels: Labels, window: int | None = None) -> Labels:
    """Return labels without those of pixels that are not valid, see `ValidLabels`; classes of subjects as they are.

    Args:
        subjects, labels: the subjects and their labels.
        window: the side of the square around each pixel of the cubes that the model sees, whose targets are then those
            of the cubes' pixels; None: it sees whole subjects.
    """
    on_cube = window is not None
    if labels.task != "segmentation" or (isinstance(labels, ValidLabels) and labels.on_cube >= on_cube):
        return labels
    return ValidLabels(subjects, labels, on_cube=on_cube)


class _Valid:
    """Reads targets, resizes some, and leaves out the pixels that are not valid."""

    def __init__(self, labels: Labels, sizes: Mapping[int, tuple[int, int]], invalid: Mapping[int, Tensor]) -> None:
        self.labels, self.sizes, self.invalid = labels, sizes, invalid

    def __call__(self, index: int) -> Tensor:
        target = self.labels.target(index, self.sizes.get(index))
        missing = self.invalid.get(index)
        return target if missing is None else target.masked_fill(missing, UNLABELLED)

"""Batches of labelled subjects; their order and flips depend on the seed only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ...data import Sample
from ...data.augment import augment
from ...data.loading import SampleLoader
from ...data.subjects import Subjects
from ..sampling import shuffled
from .labels import UNLABELLED, Labels, resize_labels
from .settings import FinetuneSettings


def loader(data: Dataset[Item], items: int, settings: FinetuneSettings, *, shuffled: bool) -> DataLoader[Item]:
    """Return a loader over one pass at a time of the first `items` visits, shuffled or in order."""
    return SampleLoader(
        data,
        batch_sampler=Order(items, settings.batch, settings.seed, shuffled=shuffled),
        collate_fn=_collate,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


class Item(NamedTuple):
    """A labelled subject, or a batch of them, with one more dimension in front."""

    name: Any  # str, or a list
    hsi: Tensor  # [1, T, S, S]
    target: Any  # Tensor, int64 [] or [S, S], or of the labels' own size; a list if sizes in a batch differ


def labelled(sample: Sample, labels: Labels, index: int, size: tuple[int, int] | None = None) -> Item:
    """Return a sample with its target, in which pixels that are not valid have no label.

    Args:
        sample: the sample.
        labels: of all subjects.
        index: number of the subject.
        size: height and width of a target of pixels; None: those of the sample.
    """
    height, width = size or sample.valid.shape
    target = labels.target(index, (height, width))
    if target.dim() == 2:
        target = target.masked_fill(resize_labels(sample.valid.long(), (height, width)) == 0, UNLABELLED)
    return Item(sample.name, sample.hsi, target)


def own_size(subjects: Subjects, labels: Labels, index: int) -> tuple[int, int] | None:
    """Return height and width of a target of pixels before it is resized, those of its window for a tile."""
    if labels.task != "segmentation":
        return None
    if subjects.positions:
        window = subjects.positions[index].window
        return window.height, window.width
    height, width = labels.target(index).shape
    return height, width


def trained_labels(subjects: Subjects, labels: Labels, chosen: Sequence[int]) -> Labels:
    """Return the labels of the subjects `chosen`, with the counts of their targets at the size of the samples."""
    counts = {index: labels.counts[index] for index in chosen}
    if labels.task == "segmentation":
        height, width = subjects[chosen[0]].valid.shape
        for index in chosen:
            if own_size(subjects, labels, index) != (height, width):
                target = labels.target(index, (height, width))
                counts[index] = torch.bincount(target[target != UNLABELLED], minlength=len(labels.classes))
    return labels.with_counts(counts)


class Labelled(Dataset[Item]):
    """Labelled subjects by visit: item v is subject `chosen[v % len(chosen)]`, flipped at random by (seed, v).

    Args:
        subjects: the subjects.
        labels: their labels.
        chosen: numbers of the subjects to take.
        settings: of which the seed is used.
        augmented: whether they are flipped.
        whole: whether targets keep the size of the labels, or of the tile's window, whatever that of the samples.
    """

    def __init__(
        self,
        subjects: Subjects,
        labels: Labels,
        chosen: Sequence[int],
        settings: FinetuneSettings,
        *,
        augmented: bool,
        whole: bool = False,
    ) -> None:
        self.subjects, self.labels, self.chosen = subjects, labels, chosen
        self.seed, self.augmented, self.whole = settings.seed, augmented, whole

    def __getitem__(self, visit: int) -> Item:
        index = self.chosen[visit % len(self.chosen)]
        size = own_size(self.subjects, self.labels, index) if self.whole else None
        item = labelled(self.subjects[index], self.labels, index, size)
        return flipped(item, self.seed, visit) if self.augmented else item


def flipped(item: Item, seed: int, visit: int) -> Item:
    """Return an item whose cube, and target of pixels, are mirrored and transposed at random by (seed, visit)."""
    mask = item.target if item.target.dim() == 2 else torch.zeros(item.hsi.shape[-2:], dtype=torch.int64)
    carrier = Sample(item.name, item.hsi, {"label": mask[None].double()}, torch.ones_like(mask, dtype=torch.bool))
    generator = np.random.default_rng([seed, visit])
    turned = augment(carrier, generator, crop=None, flip=True)  # without a crop nothing is interpolated
    target = item.target if item.target.dim() == 0 else turned.aux["label"][0].long()
    return Item(item.name, turned.hsi, target)


class Order(Sampler[list[int]]):
    """Yields batches of visits `epoch * subjects + subject`: each subject once an epoch, shuffled or in order."""

    def __init__(self, subjects: int, batch: int, seed: int, *, shuffled: bool) -> None:
        self.subjects, self.batch, self.seed, self.shuffled, self.epoch = subjects, batch, seed, shuffled, 0

    def __len__(self) -> int:
        return math.ceil(self.subjects / self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        order = shuffled(self.subjects, self.seed, self.epoch) if self.shuffled else range(self.subjects)
        visits = [self.epoch * self.subjects + subject for subject in order]
        self.epoch += 1
        yield from (visits[start : start + self.batch] for start in range(0, self.subjects, self.batch))


def _collate(items: Sequence[Item]) -> Item:
    names, volumes, targets = zip(*items, strict=True)
    alike = len({target.shape for target in targets}) == 1
    return Item(list(names), torch.stack(volumes), torch.stack(targets) if alike else list(targets))

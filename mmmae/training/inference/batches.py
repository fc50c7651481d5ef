"""Batches of all subjects, once and in order, with a progress bar, and checks before them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch

from ...checks import check_choice, check_whole
from ...config import MMMAEConfig
from ...data import Batch, Sample, collate
from ...data.loading import SampleLoader
from ...data.subjects import Subjects
from ...data.windows import reflect
from ...files import check_replaces_none
from ...precision import Precision
from ..bar import progress_bar


def batches(subjects: Subjects, batch: int, workers: int, *, label: str, window: int | None = None) -> Iterator[Batch]:
    """Yield batches without auxiliary images, and show the progress on standard error, if that is a terminal.

    Args:
        subjects: the subjects.
        batch: samples in a batch.
        workers: processes that read data.
        label: what the bar is called.
        window: side in pixels of squares, to which smaller samples are continued by reflection; None: all samples have
            one size.
    """
    _ = subjects.normalization  # computed before workers start
    stack = functools.partial(_stack, window)
    loader: SampleLoader[Batch] = SampleLoader(subjects, batch_size=batch, collate_fn=stack, num_workers=workers)
    with progress_bar(label, len(subjects)) as advance:
        for samples in loader:
            yield samples
            advance(len(samples))


def check_options(
    config: MMMAEConfig, subjects: Subjects, precision: Precision, *, batch: int = 1, workers: int = 0
) -> None:
    """Raise ValueError unless there are subjects, with the bands that a model takes, and the options are allowed."""
    check_whole("batch", batch, 1)
    check_whole("workers", workers, 0)
    check_choice("precision", precision, get_args(Precision))
    if len(subjects) == 0:
        raise ValueError("there are no subjects, expected at least one")
    if subjects.bands != config.bands:
        raise ValueError(f"the subjects have {subjects.bands} bands, the model takes {config.bands}")


def first_subjects(subjects: Subjects) -> dict[str, int]:
    """Return scene -> number of its first tile, or name -> number if the subjects are no tiles."""
    firsts: dict[str, int] = {}
    for index, scene in enumerate([position.scene for position in subjects.positions] or subjects.names):
        firsts.setdefault(scene, index)
    return firsts


def check_outputs(subjects: Subjects, outputs: Collection[Path]) -> None:
    """Raise ValueError if a file that is to be written is a folder, or one that subjects are read from."""
    if folder := next((path for path in outputs if path.is_dir()), None):
        raise ValueError(f"{folder} is a folder, expected a file")
    check_replaces_none(outputs, {path for index in range(len(subjects)) for path in subjects.files(index).values()})


def _stack(window: int | None, samples: Sequence[Sample]) -> Batch:
    if window is None:
        return collate(samples, ())
    squares = []
    for sample in samples:
        rows, columns = (reflect(torch.arange(max(side, window)), side) for side in sample.valid.shape)
        squares.append(Sample(sample.name, sample.hsi[..., rows, :][..., columns], {}, sample.valid[rows][:, columns]))
    return collate(squares, ())

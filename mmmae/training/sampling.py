"""The subjects of each batch, a function of seed and step only, so that a run can be stopped and resumed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import Batch, Sample, Subjects, collate
from ..data.augment import augment
from ..data.loading import SampleLoader
from .settings import PretrainSettings

HOLD_OUT_STREAM, ORDER_STREAM = 1, 2  # make these draws independent of others from the same seed


def shuffled(count: int, seed: int, number: int) -> list[int]:
    """Return the numbers from 0 to `count - 1` in the order that belongs to (seed, number of the pass).

    NumPy mixes all bits of both numbers into the state of its generator; torch's generator for the CPU keeps the lower
    32 bits of one.
    """
    order: list[int] = np.random.default_rng([seed, number, ORDER_STREAM]).permutation(count).tolist()
    return order


class StepSampler(Sampler[list[int]]):
    """Yields the batches of the steps `start..steps-1` of a run, as numbers of visits.

    Each pass over the subjects has an order of its own, drawn from (seed, pass); the remainder that does not fill a
    batch on every rank is left out of that pass, so that no batch holds a subject twice. The number of a visit is
    `pass * subjects + subject`.

    Args:
        subjects: number of subjects.
        batch: samples a step on each rank.
        steps: number of steps of the whole run.
        seed: seed of the orders.
        start: the first step.
        rank, ranks: number of this process, and how many share a step.

    Raises:
        ValueError: there are fewer subjects than one step takes.
    """

    def __init__(
        self, subjects: int, batch: int, steps: int, seed: int, *, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        if subjects < batch * ranks:
            share = f" on each of {ranks} ranks" if ranks > 1 else ""
            raise ValueError(f"batch is {batch}{share}, expected at most the number of subjects, {subjects}")
        self.subjects, self.batch, self.steps, self.seed = subjects, batch, steps, seed
        self.start, self.rank, self.ranks = start, rank, ranks

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        a_pass = self.subjects // (self.batch * self.ranks)
        for step in range(self.start, self.steps):
            number, place = divmod(step, a_pass)
            if place == 0 or step == self.start:
                order = shuffled(self.subjects, self.seed, number)
            first = (place * self.ranks + self.rank) * self.batch
            yield [number * self.subjects + subject for subject in order[first : first + self.batch]]


class Visits(Dataset[Sample]):
    """Samples by visit: item v is subject `chosen[v % len(chosen)]`, augmented at random by (seed, v)."""

    def __init__(
        self, subjects: Subjects, chosen: Sequence[int], settings: PretrainSettings, *, augmented: bool
    ) -> None:
        self.subjects, self.chosen, self.seed = subjects, chosen, settings.seed
        self.crop, self.flip = (settings.crop, settings.flip) if augmented else (1.0, False)

    def __getitem__(self, visit: int) -> Sample:
        sample = self.subjects[self.chosen[visit % len(self.chosen)]]
        if self.crop == 1 and not self.flip:
            return sample
        generator = np.random.default_rng([self.seed, visit])
        return augment(sample, generator, crop=(self.crop, 1.0) if self.crop < 1 else None, flip=self.flip)


def hold_out(subjects: int, validation: int, seed: int) -> tuple[list[int], list[int]]:
    """Draw `validation` subjects to hold out; return the numbers of the others and theirs, each in ascending order.

    Raises:
        ValueError: no subject is left to train on.
    """
    if validation >= subjects:
        raise ValueError(f"validation is {validation}, expected less than the number of subjects, {subjects}")
    order = np.random.default_rng([seed, HOLD_OUT_STREAM]).permutation(subjects).tolist()
    return sorted(order[validation:]), sorted(order[:validation])


class SubjectData(lightning.LightningDataModule):
    """Loads the batches of a run; its state in a checkpoint is the number of completed steps.

    Raises:
        ValueError: there are fewer subjects than one step of `ranks` processes takes, or the held-out ones do not fill
            whole batches.
    """

    def __init__(self, subjects: Subjects, settings: PretrainSettings, ranks: int) -> None:
        super().__init__()
        self.subjects, self.settings, self.start = subjects, settings, 0
        self.training, self.held_out = hold_out(len(subjects), settings.validation, settings.seed)
        StepSampler(len(self.training), settings.batch, settings.steps, settings.seed, ranks=ranks)  # raises
        if settings.validation % (settings.batch * ranks):
            raise ValueError(
                f"validation is {settings.validation}, expected a multiple of {settings.batch * ranks}, the samples of "
                "a forward pass on all processes"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return a loader of the batches from the next step on."""
        settings = self.settings
        passes = settings.steps * settings.accumulate
        return self._loader(self.training, passes, start=self.start * settings.accumulate, augmented=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Return a loader of one pass over the held-out subjects."""
        assert self.trainer is not None
        if not self.held_out:
            return []
        steps = len(self.held_out) // (self.settings.batch * self.trainer.world_size)
        return self._loader(self.held_out, steps, start=0, augmented=False)

    def training_batch(self, number: int) -> Batch:
        """Read the batch of one forward pass of this process again; passes of a run are numbered from 0."""
        assert self.trainer is not None
        loader = self._loader(self.training, number + 1, start=number, augmented=True, workers=0)
        batch: Batch = next(iter(loader))
        return batch

    def _loader(
        self, chosen: Sequence[int], steps: int, *, start: int, augmented: bool, workers: int | None = None
    ) -> DataLoader[Batch]:
        assert self.trainer is not None
        settings = self.settings
        workers = settings.workers if workers is None else workers
        sampler = StepSampler(
            len(chosen),
            settings.batch,
            steps,
            settings.seed,
            start=start,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
        )
        return SampleLoader(
            Visits(self.subjects, chosen, settings, augmented=augmented),
            batch_sampler=sampler,
            collate_fn=functools.partial(collate, modalities=list(self.subjects.modalities)),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the number of completed steps."""
        assert self.trainer is not None
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the completed steps."""
        self.start = int(state_dict["step"])

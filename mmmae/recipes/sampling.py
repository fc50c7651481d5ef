"""Which subjects make up which batch: a function of seed and step alone, so that a run can stop and go on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import lightning
import torch
from torch.utils.data import DataLoader, Sampler

from ..data import Batch, Normalization, Sample, collate


class Subjects(Protocol):
    """What a data set of subjects offers: `PairedFolder`, `Phantom`, or one of your own."""

    modalities: dict[str, int]
    bands: int

    @property
    def names(self) -> list[str]:
        """Their names."""

    @property
    def normalization(self) -> Normalization:
        """How values in files became values of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class StepSampler(Sampler[list[int]]):
    """Batches of subject numbers for the steps `start..steps-1` of a run.

    Each pass over the subjects has an order of its own, drawn from (seed, pass); the rest that does not fill a batch on
    every rank is left out of that pass, so that no batch holds a subject twice.

    Args:
        subjects: how many there are.
        batch: samples a step and rank.
        steps: of the whole run.
        seed: of the orders.
        start: the first step to make.
        rank, ranks: of this process among those that share a step.

    Raises:
        ValueError: there are fewer subjects than one step takes.
    """

    def __init__(
        self, subjects: int, batch: int, steps: int, seed: int, *, start: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        if subjects < batch * ranks:
            share = f" on each of {ranks} ranks" if ranks > 1 else ""
            raise ValueError(f"batch is {batch}{share}, allowed is at most the number of subjects, {subjects}")
        self.subjects, self.batch, self.steps, self.seed = subjects, batch, steps, seed
        self.start, self.rank, self.ranks = start, rank, ranks

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        a_pass = self.subjects // (self.batch * self.ranks)
        for step in range(self.start, self.steps):
            number, place = divmod(step, a_pass)
            if place == 0 or step == self.start:
                generator = torch.Generator().manual_seed(self.seed * 2**31 + number)
                order = torch.randperm(self.subjects, generator=generator).tolist()
            first = (place * self.ranks + self.rank) * self.batch
            yield order[first : first + self.batch]


class SubjectData(lightning.LightningDataModule):
    """Feeds a run; its state in a checkpoint is the number of steps made."""

    def __init__(self, subjects: Subjects, *, batch: int, steps: int, seed: int, workers: int) -> None:
        super().__init__()
        self.subjects, self.batch, self.steps, self.seed, self.workers = subjects, batch, steps, seed, workers
        self.start = 0

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches from the next step on."""
        assert self.trainer is not None
        sampler = StepSampler(
            len(self.subjects),
            self.batch,
            self.steps,
            self.seed,
            start=self.start,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
        )
        return DataLoader(
            self.subjects,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=functools.partial(collate, modalities=list(self.subjects.modalities)),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def state_dict(self) -> dict[str, Any]:
        """The number of steps made."""
        assert self.trainer is not None
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the steps made."""
        self.start = int(state_dict["step"])

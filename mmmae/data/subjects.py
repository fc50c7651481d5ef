"""What a data set of subjects offers: files, a cache, shards, generated ones, or one of your own."""

from __future__ import annotations

from typing import Protocol

from .normalization import Normalization
from .sample import Sample


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

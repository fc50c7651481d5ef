"""The base class of all data sets of subjects: files, a cache, shards, generated subjects, or your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from torch import Tensor
from torch.utils.data import Dataset

from .normalization import Normalization
from .sample import Sample
from .tiles import Position


class Subjects(Dataset[Sample], ABC):
    """A data set whose item i is the `Sample` of the subject `names[i]`.

    A subclass sets `names` and `bands` and defines `__getitem__`; everything else has a default. A `DataLoader` with
    workers pickles the data set, so keep no file open in it.

    Attributes:
        names: the subjects, each name once.
        bands: T, the number of bands of a cube.
        modalities: auxiliary modality -> channels; none by default.
        wavelengths: `[T]` nm, or None if they are not known.
        positions: the `Position` of each subject if the subjects are tiles of scenes; else empty.
        normalization: how values in physical units become those of the samples; by default they are the same. Pictures
            and errors are in these units, and a trained model keeps the statistics.

    Example:
        >>> import torch
        >>> from mmmae.data import Sample, Subjects
        >>> class Noise(Subjects):
        ...     bands, names = 12, ["first", "second"]
        ...     def __getitem__(self, index):
        ...         valid = torch.ones(32, 32, dtype=torch.bool)
        ...         return Sample(self.names[index], torch.randn(1, 12, 32, 32), {}, valid)
        >>> len(Noise()), Noise().wavelengths, Noise()[1].name
        (2, None, 'second')
    """

    names: list[str]
    bands: int
    modalities: Mapping[str, int] = MappingProxyType({})
    wavelengths: Tensor | None = None
    positions: Sequence[Position] = ()

    @cached_property
    def normalization(self) -> Normalization:
        """Statistics that leave values as they are."""
        return Normalization.identity({"hsi": self.bands, **self.modalities})

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    def __len__(self) -> int:
        return len(self.names)

    def files(self, index: int) -> dict[str, Path]:
        """Return the source files of a subject, for error messages and to notice changes: modality -> path."""
        return {}

    def cube_size(self, index: int) -> tuple[int, int] | None:
        """Return height and width of a subject's cube before it is resized, or None if they are not known."""
        return None


def contents(subjects: Subjects, kind: str = "subject") -> str:
    """Return the numbers of subjects, or of another kind of item, of bands and of auxiliary channels, for `repr`."""
    numbers = ((len(subjects), kind), (subjects.bands, "band"))
    text = ", ".join(f"{number} {what}{'' if number == 1 else 's'}" for number, what in numbers)
    return f"{text}, aux={dict(subjects.modalities)}" if subjects.modalities else text

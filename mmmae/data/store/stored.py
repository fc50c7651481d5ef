"""The common part of caches and shards: an index, checksums, and samples as named tensors."""

import os
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_convert

from ...files import is_file_name, json_value
from ..loading import SampleLoader
from ..normalization import Normalization
from ..readers.windows import Window
from ..sample import Sample
from ..subjects import Subjects, contents
from ..tiles import Position

INDEX_NAME = "index.json"

Track: TypeAlias = Callable[[Iterable[int]], Iterable[int]]


class StoredSubjects(Subjects):
    """Subjects listed in an index; each sample equals, bit by bit, that of the data set that was stored.

    Args:
        folder: the folder that was written.
        modalities: the auxiliary images to read; None for all.
        check_files: False does not look for missing and truncated files; they are errors on access.

    Attributes:
        names, positions, modalities, bands, wavelengths, normalization: those of the data set that was stored.
        image_size: (height, width) of the samples.

    Raises:
        FileNotFoundError: the folder has no index: it holds something else, or was not finished.
        ValueError: at construction, the index or a file is damaged, or a modality does not exist; on access, values
            differ from those written. The message names the path.
    """

    FORMAT = ""

    def __init__(
        self, folder: str | os.PathLike[str], modalities: Sequence[str] | None = None, *, check_files: bool = True
    ) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder / INDEX_NAME, self.FORMAT)
        try:
            self.bands, self.image_size = int(index["bands"]), (int(index["height"]), int(index["width"]))
            self.modalities = {str(name): int(channels) for name, channels in index["modalities"].items()}
            nm = index["wavelengths"]
            self.wavelengths = None if nm is None else torch.tensor(nm, dtype=torch.float32)
            self.normalization = Normalization.from_json(index["normalization"])
            self._entries: list[dict[str, Any]] = index["subjects"]
            self.names = [str(entry["name"]) for entry in self._entries]
            places = [entry["position"] for entry in self._entries if "position" in entry]  # of all, or of none
            self.positions = [Position(str(scene), Window(*map(int, window))) for scene, *window in places]
            for entry in self._entries:
                _check_entry(entry)
        except (KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{self.folder / INDEX_NAME}: is damaged: {type(error).__name__} {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.folder / INDEX_NAME}: is damaged: {error}") from error
        if check_files:
            self._check_files(self._entries)
        if modalities is not None:
            if unknown := [name for name in modalities if name not in self.modalities]:
                raise ValueError(f"{self.folder} has no modality {unknown}; it has {list(self.modalities)}")
            self.modalities = {name: self.modalities[name] for name in modalities}

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        wanted = ["hsi", "valid", *(f"aux.{name}" for name in self.modalities if f"aux.{name}" in entry["crc32"])]
        path, tensors = self._read(entry, wanted)
        for key in wanted:
            if checksum(tensors[key]) != entry["crc32"][key]:
                raise ValueError(f"{path}: is damaged: {key} of subject {entry['name']!r} is not what was written")
        return to_sample(entry["name"], tensors)

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"{type(self).__name__}({self.folder}: {contents(self)}, image_size={(height, width)})"

    def file(self, index: int) -> Path:
        """Return the file that a subject is read from."""
        return self.folder / str(self._entries[index]["file"])

    @abstractmethod
    def _check_files(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for the first file that is missing or does not have the size in the index."""

    @abstractmethod
    def _read(self, entry: Mapping[str, Any], wanted: Sequence[str]) -> tuple[Path, dict[str, Tensor]]:
        """Return the file of a subject and its tensors of the `wanted` names."""


def _check_entry(entry: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError if a field of a subject's entry is missing or has a wrong type."""
    place = Path(entry["file"])
    if place.is_absolute() or ".." in place.parts:
        raise ValueError(f"file is {str(place)!r}, expected a path within the folder")
    names = [str(entry["name"]), *(str(scene) for scene in entry.get("position", [])[:1])]
    if unsafe := [name for name in names if not is_file_name(name)]:
        raise ValueError(f"a subject is named {unsafe[0]!r}, expected a name that a file can have")
    crc32 = entry["crc32"]
    numbers = [entry["bytes"], entry.get("offset", 0), crc32["hsi"], crc32["valid"], *crc32.values()]
    if wrong := [number for number in numbers if type(number) is not int or number < 0]:
        raise ValueError(f"subject {entry['name']!r} has the entry {wrong[0]!r}, expected a whole number >= 0")


def describe(subjects: Subjects, form: str) -> dict[str, Any]:
    """Return the index of a data set without the entries of its subjects."""
    subjects.normalization  # noqa: B018  computed here, once, and not in every worker
    height, width = subjects[0].hsi.shape[-2:]
    return {
        "format": form,
        "source": repr(subjects),
        "height": height,
        "width": width,
        "bands": subjects.bands,
        "wavelengths": None if subjects.wavelengths is None else subjects.wavelengths.tolist(),
        "modalities": dict(subjects.modalities),
        "normalization": subjects.normalization.to_json(),
    }


def make_entry(subjects: Subjects, index: int, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the index entry of a subject without its file: name, checksums, and position if it is a tile."""
    entry: dict[str, Any] = {"name": name, "crc32": {key: checksum(tensor) for key, tensor in tensors.items()}}
    if subjects.positions:
        scene, window = subjects.positions[index]
        entry["position"] = [scene, *window]
    return entry


def read_samples(subjects: Subjects, chosen: Sequence[int], workers: int) -> Iterator[Sample]:
    """Yield the samples of the chosen subjects in order, read by `workers` processes."""
    # Without a batch size the loader hands samples through as they are; a Sampler may be any sequence.
    yield from SampleLoader(subjects, batch_size=None, sampler=chosen, num_workers=workers, collate_fn=default_convert)


def to_tensors(sample: Sample) -> dict[str, Tensor]:
    """Return the tensors of a sample by the names under which they are stored."""
    tensors = {"hsi": sample.hsi, "valid": sample.valid, **{f"aux.{name}": image for name, image in sample.aux.items()}}
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def to_sample(name: str, tensors: Mapping[str, Tensor]) -> Sample:
    """Undo `to_tensors`."""
    aux = {key.removeprefix("aux."): tensor for key, tensor in tensors.items() if key.startswith("aux.")}
    return Sample(name, tensors["hsi"], aux, tensors["valid"])


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.numpy().view(np.uint8).data if tensor.numel() else b"")


def read_index(path: Path, form: str) -> dict[str, Any]:
    """Read the JSON file of an index.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another format or is damaged.
    """
    try:
        content = json_value(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, expected a folder that `mmmae data` has finished") from None
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != form:
        found = content.get("format") if isinstance(content, dict) else None
        raise ValueError(f"{path}: has the format {found!r}, expected {form!r}")
    return content

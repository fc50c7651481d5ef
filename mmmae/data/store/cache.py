"""A cache of resized and normalised subjects: a memory-mapped safetensors file each, and an index."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...files import check_can_write, write_atomically, write_json
from ..readers.envi import envi_pair
from ..subjects import Subjects
from .stored import (
    INDEX_NAME,
    StoredSubjects,
    Track,
    describe,
    make_entry,
    read_index,
    read_samples,
    to_tensors,
)

FORMAT = "mmmae-cache-1"
PLAN_NAME = "unfinished.json"
METADATA = "subject"  # key under which a file holds its subject's name and the checksums of what was written
FILES_A_FOLDER = 1000


class CachedSubjects(StoredSubjects):
    """Subjects in a folder that `write_cache` wrote; only the requested images of a subject's file are read.

    Example:
        >>> import torch
        >>> from mmmae.data import CachedSubjects, write_cache
        >>> from mmmae.phantom import Phantom
        >>> data = Phantom(3, image_size=32)
        >>> folder = write_cache(data, "cache")
        >>> cached = CachedSubjects("cache", modalities=["ir"])
        >>> cached
        CachedSubjects(cache: 3 subjects, 12 bands, aux={'ir': 1}, image_size=(32, 32))
        >>> torch.equal(cached[2].hsi, data[2].hsi)
        True
    """

    FORMAT = FORMAT

    def _check_files(self, entries: Sequence[Mapping[str, Any]]) -> None:
        for entry in entries:
            path = self.folder / entry["file"]
            if not path.is_file():
                raise ValueError(f"{path}: is missing; write the cache again")
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path}: has {path.stat().st_size} bytes, expected {entry['bytes']}")

    def _read(self, entry: Mapping[str, Any], wanted: Sequence[str]) -> tuple[Path, dict[str, Tensor]]:
        path = self.folder / entry["file"]
        try:
            with safe_open(path, framework="pt") as file:
                return path, {key: file.get_tensor(key) for key in wanted}
        except SafetensorError as error:
            raise ValueError(f"{path}: is damaged: {error}") from error


def write_cache(subjects: Subjects, folder: str | os.PathLike[str], *, workers: int = 0, track: Track = iter) -> Path:
    """Write the samples of all subjects, their names and statistics into a folder that `CachedSubjects` reads.

    Each subject is a file with checksums. The same call completes a cache that was interrupted, or of which files are
    missing or damaged; complete files are not written again. The index is written last: a folder without one is not
    taken for a cache.

    Args:
        subjects: at least one.
        folder: created; may hold the same cache or the beginning of it.
        workers: processes that read data.
        track: wraps the iteration over the subjects still to be written, to show progress.

    Returns:
        The folder.

    Raises:
        ValueError: there is no subject, or the folder holds something else, such as a cache of other data or of source
            files that have changed since.
        OSError: the folder can't be written.
    """
    folder = Path(folder)
    if len(subjects) == 0:
        raise ValueError("no subjects, expected at least one")
    check_can_write(folder)
    names = subjects.names
    plan = {**describe(subjects, FORMAT), "names": names, "source_files": _source_files(subjects)}
    listed = _listed(folder, plan)
    files = [f"{index // FILES_A_FOLDER:04d}/{index:07d}.safetensors" for index in range(len(names))]

    def entry(index: int) -> dict[str, Any] | None:
        """Return the index entry of a file, or None if it is missing or damaged."""
        path = folder / files[index]
        try:
            with safe_open(path, framework="pt") as file:
                written = (file.metadata() or {}).get(METADATA)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
        except (FileNotFoundError, SafetensorError):
            return None
        subject = make_entry(subjects, index, names[index], tensors)
        return {**subject, "file": files[index], "bytes": path.stat().st_size} if _text(subject) == written else None

    entries = [entry(index) for index in range(len(names))]
    if listed == entries:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN_NAME, plan, indent=None)
    (folder / INDEX_NAME).unlink(missing_ok=True)
    missing = [index for index, found in enumerate(entries) if found is None]
    for index, sample in zip(track(missing), read_samples(subjects, missing, workers), strict=True):
        path, tensors = folder / files[index], to_tensors(sample)
        path.parent.mkdir(exist_ok=True)
        subject = make_entry(subjects, index, names[index], tensors)
        write_atomically(path, partial(save_file, tensors, metadata={METADATA: _text(subject)}))
        entries[index] = {**subject, "file": files[index], "bytes": path.stat().st_size}
    write_json(folder / INDEX_NAME, {**plan, "subjects": entries}, indent=None)
    (folder / PLAN_NAME).unlink()
    for rest in folder.rglob(".*.partial"):  # of runs that were killed while they wrote
        rest.unlink()
    return folder


def _source_files(subjects: Subjects) -> dict[str, list[int]]:
    """Return size and time of change of each source file: path -> [bytes, nanoseconds]."""
    paths = {path for index in range(len(subjects)) for path in subjects.files(index).values()}
    paths |= {envi_pair(path)[1] for path in paths if path.suffix.lower() == ".hdr"}
    return {str(path): [(found := path.stat()).st_size, found.st_mtime_ns] for path in sorted(paths)}


def _listed(folder: Path, plan: Mapping[str, Any]) -> Any:
    """Return the entries in the index of the planned cache, or None if it is not finished.

    Raises:
        ValueError: the folder holds anything but the planned cache or its beginning.
    """
    for name in (INDEX_NAME, PLAN_NAME):
        if (folder / name).exists():
            found = read_index(folder / name, FORMAT)
            if other := [key for key, value in plan.items() if found.get(key) != value]:
                raise ValueError(f"{folder}: holds a cache of other data, with other {', '.join(other)}")
            return found.get("subjects")
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and holds no cache, expected a new folder")
    return None


def _text(subject: Mapping[str, Any]) -> str:
    return json.dumps(subject, sort_keys=True)

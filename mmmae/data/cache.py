"""A cache of registered, normalised subjects: one memory-mapped safetensors file each, and an index."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..pretrained import check_can_write, write_atomically
from .stored import (
    INDEX_NAME,
    StoredSubjects,
    Track,
    describe,
    entry_of,
    read_index,
    samples_of,
    to_tensors,
    write_index,
)

if TYPE_CHECKING:
    from ..recipes.sampling import Subjects

FORMAT = "mmmae-cache-1"
PLAN_NAME = "unfinished.json"
FILES_A_FOLDER = 1000


class CachedSubjects(StoredSubjects):
    """What `write_cache` wrote; of a subject's file, only the pages of the asked images are read."""

    FORMAT = FORMAT

    def _check_files(self, entries: Sequence[Mapping[str, Any]]) -> None:
        for entry in entries:
            path = self.folder / entry["file"]
            if not path.is_file():
                raise ValueError(f"{path}: is missing; write the cache again")
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path}: has {path.stat().st_size} bytes; expected {entry['bytes']}")

    def _read(self, entry: Mapping[str, Any], wanted: Sequence[str]) -> tuple[Path, dict[str, Tensor]]:
        path = self.folder / entry["file"]
        try:
            with safe_open(path, framework="pt") as file:
                return path, {key: file.get_tensor(key) for key in wanted}
        except SafetensorError as error:
            raise ValueError(f"{path}: is damaged: {error}") from error


def write_cache(subjects: "Subjects", folder: str | os.PathLike[str], *, workers: int = 0, track: Track = iter) -> Path:
    """Write every subject as its data set gives it, with statistics and names; `CachedSubjects` reads the folder.

    A file a subject: a run that is interrupted goes on behind the last whole file, and a damaged one costs one subject.
    The index is written last: a folder without one is not taken for a cache.

    Args:
        subjects: at least one.
        folder: is made; may hold the beginning of the same cache.
        workers: processes that read.
        track: wraps the numbers of the subjects that are left to write, to show progress.

    Returns:
        The folder.

    Raises:
        ValueError: there is no subject, or the folder holds something else.
        OSError: the folder can't be written.
    """
    folder = Path(folder)
    if len(subjects) == 0:
        raise ValueError("no subjects; expected at least one")
    check_can_write(folder)
    names = subjects.names
    plan = {**describe(subjects, FORMAT), "names": names}
    if _is_complete(folder, plan):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder / PLAN_NAME, plan)
    files = [f"{index // FILES_A_FOLDER:04d}/{index:07d}.safetensors" for index in range(len(names))]

    def entry(index: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        place = {"file": files[index], "bytes": (folder / files[index]).stat().st_size}
        return {**entry_of(subjects, index, names[index], tensors), **place}

    entries = {
        index: entry(index, tensors)
        for index, file in enumerate(files)
        if (tensors := _load_if_whole(folder / file)) is not None
    }
    missing = [index for index in range(len(names)) if index not in entries]
    for index, sample in zip(track(missing), samples_of(subjects, missing, workers), strict=True):
        path, tensors = folder / files[index], to_tensors(sample)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, partial(save_file, tensors))
        entries[index] = entry(index, tensors)
    write_index(folder / INDEX_NAME, {**plan, "subjects": [entries[index] for index in range(len(names))]})
    (folder / PLAN_NAME).unlink()
    for rest in folder.rglob(".*.partial"):  # of runs that were killed while they wrote
        rest.unlink()
    return folder


def _is_complete(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the folder is the planned cache; raises a ValueError if it is anything but that or its beginning."""
    for name in (INDEX_NAME, PLAN_NAME):
        if (folder / name).exists():
            found = read_index(folder / name, FORMAT)
            if other := [key for key, value in plan.items() if found.get(key) != value]:
                raise ValueError(f"{folder}: holds a cache of other data; different are {', '.join(other)}")
            return name == INDEX_NAME
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and holds no cache; expected a new folder")
    return False


def _load_if_whole(path: Path) -> dict[str, Tensor] | None:
    """What an interrupted run has written, or None."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None

"""Tar shards of resized and normalised subjects, which webdataset can stream, with an index for random access."""

import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...files import PERMISSIONS, check_can_write, write_json
from ..sample import Sample
from ..subjects import Subjects
from .stored import (
    INDEX_NAME,
    StoredSubjects,
    Track,
    describe,
    make_entry,
    read_samples,
    to_sample,
    to_tensors,
)

FORMAT = "mmmae-shards-1"
MEMBER = ".safetensors"


class ShardedSubjects(StoredSubjects):
    """Subjects in a folder that `write_shards` wrote; a subject is read from its place in one shard."""

    FORMAT = FORMAT

    def _check_files(self, entries: Sequence[Mapping[str, Any]]) -> None:
        ends: dict[str, int] = {}
        for entry in entries:
            ends[entry["file"]] = max(ends.get(entry["file"], 0), entry["offset"] + entry["bytes"])
        for file, end in ends.items():
            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"{path}: is missing; write the shards again")
            if path.stat().st_size < end:
                raise ValueError(f"{path}: has {path.stat().st_size} bytes, expected at least {end}")

    def _read(self, entry: Mapping[str, Any], wanted: Sequence[str]) -> tuple[Path, dict[str, Tensor]]:
        path = self.folder / entry["file"]
        with path.open("rb") as stream:
            stream.seek(entry["offset"])
            content = stream.read(entry["bytes"])
        try:
            tensors = load(content)
            return path, {key: tensors[key] for key in wanted}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: is damaged at subject {entry['name']!r}: {error}") from error


def sample_of(record: Mapping[str, Any]) -> Sample:
    """Convert a record of a `webdataset.WebDataset` to a `Sample`; pass this function to its `map`."""
    return to_sample(record["txt"].decode("utf-8"), load(record["safetensors"]))


def write_shards(
    subjects: Subjects,
    folder: str | os.PathLike[str],
    *,
    per_shard: int = 100,
    workers: int = 0,
    track: Track = iter,
) -> Path:
    """Write the samples of all subjects into tar files; `ShardedSubjects` reads the folder.

    Each subject has the members NUMBER.safetensors, and NUMBER.txt with its name. A temporary folder is filled and
    renamed at the end, so that there are all shards or none.

    Args:
        subjects: at least one.
        folder: created; may exist if it is empty.
        per_shard: subjects in a tar file; at 3 GB a new one is begun anyway.
        workers: processes that read data.
        track: wraps the iteration over the subjects, to show progress.

    Returns:
        The folder.

    Raises:
        ImportError: webdataset is not installed.
        ValueError: there is no subject, `per_shard` is below 1, or the folder is not empty.
        OSError: the folder can't be written.

    Example:
        >>> from mmmae.data import ShardedSubjects, write_shards
        >>> from mmmae.phantom import Phantom
        >>> folder = write_shards(Phantom(5, image_size=32), "shards", per_shard=2)
        >>> sorted(path.name for path in folder.iterdir())
        ['index.json', 'shard-000000.tar', 'shard-000001.tar', 'shard-000002.tar']
        >>> ShardedSubjects("shards")[4].name
        'phantom-0-00004'
    """
    try:
        from webdataset import ShardWriter
    except ImportError as error:
        raise ImportError("shards are written by webdataset: pip install 'mmmae[shards]'") from error
    folder = Path(folder)
    if len(subjects) == 0 or per_shard < 1:
        raise ValueError(f"{len(subjects)} subjects, {per_shard} a shard, expected at least one of each")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty, expected a new folder")
    check_can_write(folder)
    _check_names(subjects)
    index = describe(subjects, FORMAT)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
    try:
        numbers, entries = range(len(subjects)), []
        pattern = os.path.abspath(partial).replace("%", "%%") + "/shard-%06d.tar"
        with ShardWriter(pattern, maxcount=per_shard, verbose=0, encoder=False, post=_flush) as writer:
            for number, sample in zip(track(numbers), read_samples(subjects, numbers, workers), strict=True):
                tensors = to_tensors(sample)
                text = sample.name.encode("utf-8")
                writer.write({"__key__": f"{number:08d}", "safetensors": save(tensors), "txt": text})
                entries.append(make_entry(subjects, number, sample.name, tensors))
        places = [place for shard in sorted(partial.glob("*.tar")) for place in _members(shard)]
        index["subjects"] = [{**entry, **place} for entry, place in zip(entries, places, strict=True)]
        write_json(partial / INDEX_NAME, index, indent=None)
        partial.chmod(PERMISSIONS | (PERMISSIONS & 0o444) >> 2)  # who may read may enter
        if folder.is_dir():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check_names(subjects: Subjects) -> None:
    """Raise ValueError for a subject whose name has bytes that are not UTF-8, as texts of shards must be."""
    for number, name in enumerate(subjects.names):
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            path = subjects.files(number).get("hsi", name)
            raise ValueError(f"{path}: its name is not UTF-8, as names in shards must be; rename it") from error


def _flush(shard: str) -> None:
    with open(shard, "rb") as written:
        os.fsync(written.fileno())


def _members(shard: Path) -> list[dict[str, Any]]:
    with tarfile.open(shard) as archive:
        return [
            {"file": shard.name, "offset": member.offset_data, "bytes": member.size}
            for member in archive
            if member.name.endswith(MEMBER)
        ]

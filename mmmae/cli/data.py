"""`mmmae data`: make files of subjects, check them, and store them for fast reading."""

from __future__ import annotations

import dataclasses
import json as json_format
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from ..checks import check_whole
from .options import Aux, DataOptions, Flag, ReadingOptions, aux_folders, open_subjects
from .output import say

if TYPE_CHECKING:
    from ..data.check import Finding

MOST_VALUES = 2**31  # of a generated cube
LINES = 10  # printed over a task where there is no terminal to draw a bar on


def check(
    folder: Positional[Path | None] = None,
    *,
    hsi: Path | None = None,
    aux: Aux,
    reading: ReadingOptions,
    wavelengths: Path | None = None,
    cache: Path | None = None,
    shards: Path | None = None,
    json: Flag = False,
) -> int:
    """Read everything once and list what is broken; the exit status is 1 if there is damage.

    Args:
        folder: folder with the folder hsi and others beside it, except labels; without hsi, a folder of cubes, or one
        hsi: instead: folder of cubes; or one such file
        aux: folder of auxiliary images with the file stems of the cubes; :0 or :0,2 picks bands
        reading: how files are read
        wavelengths: file with the wavelengths of the bands of the cubes, where they do not tell
        cache: instead: the folder that `mmmae data cache` wrote
        shards: instead: the folder that `mmmae data shard` wrote
        json: print JSON
    """
    from ..data import CachedSubjects, ShardedSubjects
    from ..data.check import Finding, Kind, check_files, check_stored
    from ..data.folder import read_by_modality
    from ..data.pairing import has_images
    from ..data.readers.wavelength_files import read_wavelength_file

    track = partial(_tracked, "read")
    if sum(place is not None for place in (folder, hsi, cache, shards)) != 1:
        raise ValueError("expected one of DIR, --hsi, --cache and --shards: what to check")
    if aux and hsi is None:
        raise ValueError("--aux needs --hsi, the folder of cubes")
    place = cache or shards
    how_files = {**dataclasses.asdict(reading), "wavelengths": wavelengths}
    if place is not None and (given := [f"--{option}" for option, value in how_files.items() if value]):
        raise ValueError(f"{given[0]} says how files are read, it can't be combined with --cache or --shards")
    if place is not None:
        stored = (CachedSubjects if cache is not None else ShardedSubjects)(place, check_files=False)
        return _report(len(stored), check_stored(stored, track=track), json)
    folders = aux_folders(aux)
    empty: list[Finding] = []
    if folder is not None:
        hsi = folder / "hsi"
        if hsi.is_dir():
            beside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
            beside = [path for path in beside if path.name not in ("hsi", "labels")]
            folders = {path.name: str(path) for path in beside if has_images(path)}
            reason = "is not read: it holds no image"
            empty = [Finding(Kind.NOTE, path.name, "", path, reason) for path in beside if path.name not in folders]
        else:
            hsi = _folder_of_cubes(folder)
    assert hsi is not None
    how = read_by_modality(["hsi", *folders], **reading.by_modality(["hsi", *folders]))
    if wavelengths is not None:
        if not wavelengths.is_file():
            raise FileNotFoundError(f"--wavelengths is {wavelengths}, expected a file with those of all bands")
        how["hsi"]["wavelengths"] = read_wavelength_file(wavelengths)
    count, findings = check_files(hsi, folders, reading=how, track=track)
    return _report(count, [*findings, *empty], json)


def cache(data: DataOptions, *, out: Path, image_size: int | None = None, workers: int = 0) -> None:
    """Write subjects as they are trained on, one memory-mapped file each.

    Args:
        out: folder of the cache
        image_size: resize images to this many pixels; None: as the files are
        workers: processes that read data
    """
    from ..data import write_cache

    check_whole("--workers", workers, 0)
    subjects = open_subjects(data, image_size)
    write_cache(subjects, out, workers=workers, track=partial(_tracked, "cached"))
    say(f"{out} holds {subjects!r}")


def shard(
    data: DataOptions, *, out: Path, image_size: int | None = None, workers: int = 0, per_shard: int = 100
) -> None:
    """Write subjects as they are trained on, as tar files for webdataset.

    Args:
        out: folder of the shards
        image_size: resize images to this many pixels; None: as the files are
        workers: processes that read data
        per_shard: subjects in a shard
    """
    from ..data import write_shards

    check_whole("--workers", workers, 0)
    subjects = open_subjects(data, image_size)
    try:
        write_shards(subjects, out, per_shard=per_shard, workers=workers, track=partial(_tracked, "packed"))
    except ImportError as error:
        raise ValueError(str(error)) from error
    say(f"{out} holds {subjects!r}")


def phantom(
    folder: Positional[Path],
    *,
    subjects: int = 12,
    size: int = 64,
    bands: int = 12,
    seed: int = 0,
    missing: float = 0.15,
) -> None:
    """Write generated subjects as files, for trials.

    Args:
        folder: a new or empty folder
        subjects: how many
        size: height and width in pixels
        bands: spectral bands over 450 to 900 nm
        seed: seed of the subjects
        missing: probability that an auxiliary image is missing
    """
    from ..phantom import write_phantom

    for option, value, least in (("subjects", subjects, 1), ("size", size, 1), ("bands", bands, 1), ("seed", seed, 0)):
        check_whole(f"--{option}", value, least)
    if size**2 * bands > MOST_VALUES:
        raise ValueError(
            f"--size {size} and --bands {bands} make cubes of {size**2 * bands:.3g} values, more than 2^31"
        )
    if not 0 <= missing <= 1:
        raise ValueError(f"--missing is {missing:g}, expected a number in [0, 1]")
    files = write_phantom(folder, subjects, size, bands, seed, missing)
    say(f"wrote {subjects} generated subjects, no measurements, as {len(files)} files into {folder}")


def _folder_of_cubes(folder: Path) -> Path:
    from ..data.pairing import cubes_in

    try:
        cubes_in(folder)
    except ValueError as error:
        raise ValueError(f"{error}; {folder / 'hsi'} is not there: name the folder of cubes with --hsi") from error
    return folder


def _report(count: int, findings: list[Finding], as_json: bool) -> int:
    damage = [finding for finding in findings if finding.kind.is_damage]
    if as_json:
        rows = [
            {
                "kind": finding.kind.value,
                "damage": finding.kind.is_damage,
                "modality": finding.modality,
                "subject": finding.subject,
                "path": str(finding.path),
                "reason": finding.reason,
            }
            for finding in findings
        ]
        print(json_format.dumps({"files": count, "findings": rows}, indent=1))
        return 1 if damage else 0
    for finding in findings:
        say(f"{finding.kind.value:<13} {finding.modality:<10} {finding.path}: {finding.reason}")
    kinds = len({finding.kind for finding in damage})
    counts = ((len(damage), "finding"), (kinds, "kind"))
    found = " of ".join(f"{number} {what}{'' if number == 1 else 's'}" for number, what in counts)
    summary = f"{found} of damage" if damage else "no damage"
    print(f"read {count}: {summary}")
    return 1 if damage else 0


def _tracked(done: str, numbers: Iterable[int]) -> Iterator[int]:
    """Yield `numbers` and show on standard error how many are done: as a bar on a terminal, else a line at times."""
    from rich.console import Console
    from rich.progress import track

    chosen, console = list(numbers), Console(stderr=True)
    if console.is_terminal:
        yield from track(chosen, description=done, console=console)
        return
    for count, number in enumerate(chosen, start=1):
        yield number
        if count % max(len(chosen) // LINES, 1) == 0 or count == len(chosen):
            print(f"{done} {count}/{len(chosen)}", file=sys.stderr)

"""`mmmae data`: make files of subjects, check them, and store them for fast reading."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .options import Commands, add_aux_option, add_data_options, aux_folders, open_subjects, process_count

if TYPE_CHECKING:
    from ..data.check import Finding

LINES = 10  # printed over a task where there is no terminal to draw a bar on


def add(commands: Commands) -> None:
    """Declare the command and its parts."""
    parser = commands.add_parser("data", help="generate, check, cache and pack files of subjects")
    parts = parser.add_subparsers(dest="part", required=True, metavar="part")
    _add_check(parts)
    for name, run, goes, meaning in (
        ("cache", _run_cache, "a cache goes", "write subjects as they are trained on, one memory-mapped file each"),
        ("shard", _run_shard, "shards go", "write subjects as they are trained on, as tar files for webdataset"),
    ):
        parser = parts.add_parser(name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
        add_data_options(parser, generated=False)
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"where {goes}")
        parser.add_argument("--image-size", type=int, metavar="PIXELS", help="resize to; default: as the files are")
        parser.add_argument(
            "--workers", type=process_count, default=0, metavar="N", help="processes that read; default: 0"
        )
        parser.set_defaults(run=run)
        if name == "shard":
            parser.add_argument("--per-shard", type=int, default=100, metavar="N", help="subjects; default: 100")
    _add_phantom(parts)


def _add_check(parts: Commands) -> None:
    parser = parts.add_parser(
        "check",
        help="read everything once and list what is broken",
        description="Read everything once and list what is broken. Exit status 1 if there is damage.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="DIR/hsi and the folders beside it, except DIR/labels; without DIR/hsi: a folder of cubes",
    )
    parser.add_argument("--hsi", type=Path, metavar="DIR", help="instead: folder of cubes")
    add_aux_option(parser)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="instead: what `mmmae data cache` wrote")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="instead: what `mmmae data shard` wrote")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run_check)


def _add_phantom(parts: Commands) -> None:
    parser = parts.add_parser("phantom", help="write generated subjects as files, for trials")
    parser.add_argument("folder", type=Path, metavar="DIR", help="is made; refused if there is something in it")
    parser.add_argument("--subjects", type=int, default=12, metavar="N", help="default: 12")
    parser.add_argument("--size", type=int, default=64, metavar="S", help="height and width; default: 64")
    parser.add_argument("--bands", type=int, default=12, metavar="T", help="default: 12, over 450 to 900 nm")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="default: 0")
    parser.add_argument(
        "--missing", type=float, default=0.15, metavar="P", help="probability that an image is missing; default: 0.15"
    )
    parser.set_defaults(run=_run_phantom)


def _run_check(options: argparse.Namespace) -> int:
    from ..data import CachedSubjects, ShardedSubjects
    from ..data.check import check_files, check_stored

    track = partial(_tracked, "read")
    if sum(place is not None for place in (options.folder, options.hsi, options.cache, options.shards)) != 1:
        raise ValueError("expected one of DIR, --hsi, --cache and --shards: what to check")
    if options.aux and options.hsi is None:
        raise ValueError("--aux needs --hsi, the folder of cubes")
    if options.cache is not None or options.shards is not None:
        kind = CachedSubjects if options.cache is not None else ShardedSubjects
        stored = kind(options.cache or options.shards, check_files=False)
        return _report(len(stored), check_stored(stored, track=track), options.json)
    hsi, aux = options.hsi, aux_folders(options)
    if options.folder is not None:
        hsi = options.folder / "hsi"
        if hsi.is_dir():
            beside = [path for path in sorted(options.folder.iterdir()) if path.is_dir()]
            aux = {path.name: str(path) for path in beside if path.name not in ("hsi", "labels")}
        else:
            hsi = _folder_of_cubes(options.folder)
    return _report(*check_files(hsi, aux, track=track), options.json)


def _folder_of_cubes(folder: Path) -> Path:
    from ..data.pairing import images_in

    try:
        images_in("hsi", folder)
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
        print(json.dumps({"files": count, "findings": rows}, indent=1))
        return 1 if damage else 0
    for finding in findings:
        print(f"{finding.kind.value:<13} {finding.modality:<10} {finding.path}: {finding.reason}")
    kinds = len({finding.kind for finding in damage})
    summary = f"{len(damage)} findings of {kinds} kinds of damage" if damage else "no damage"
    print(f"read {count}: {summary}")
    return 1 if damage else 0


def _run_cache(options: argparse.Namespace) -> None:
    from ..data import write_cache

    subjects = open_subjects(options, options.image_size)
    write_cache(subjects, options.out, workers=options.workers, track=partial(_tracked, "cached"))
    print(f"{options.out} holds {subjects!r}")


def _run_shard(options: argparse.Namespace) -> None:
    from ..data import write_shards

    subjects = open_subjects(options, options.image_size)
    try:
        write_shards(
            subjects,
            options.out,
            per_shard=options.per_shard,
            workers=options.workers,
            track=partial(_tracked, "packed"),
        )
    except ImportError as error:
        raise ValueError(str(error)) from error
    print(f"{options.out} holds {subjects!r}")


def _run_phantom(options: argparse.Namespace) -> None:
    from ..phantom import write_phantom

    for option, least in (("subjects", 1), ("size", 1), ("bands", 1), ("seed", 0)):
        if (value := getattr(options, option)) < least:
            raise ValueError(f"--{option} is {value}; expected at least {least}")
    if not 0 <= options.missing <= 1:
        raise ValueError(f"--missing is {options.missing:g}; expected a probability, 0 to 1")
    files = write_phantom(options.folder, options.subjects, options.size, options.bands, options.seed, options.missing)
    print(f"wrote {options.subjects} generated subjects, no measurements, as {len(files)} files into {options.folder}")


def _tracked(done: str, numbers: Iterable[int]) -> Iterator[int]:
    """Give `numbers` and show on standard error how many are done: a bar on a terminal, else a line now and then."""
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

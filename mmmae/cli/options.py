"""Options that several commands have in common: which data, and which fields of a config."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..config import MMMAEConfig

if TYPE_CHECKING:
    from ..data.subjects import Subjects

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

SOURCES = ("hsi", "cache", "shards")


def add_data_options(parser: argparse.ArgumentParser, *, generated: bool = True) -> None:
    """Declare the options that name a data set: files, a cache, shards, or generated subjects where none is named.

    With `generated=False` nothing is generated: `open_subjects` raises where none is named.
    """
    parser.set_defaults(generated=generated, subjects=None, missing=None)
    data = parser.add_argument_group("data")
    data.add_argument("--hsi", type=Path, metavar="DIR", help="folder of hyperspectral cubes, one file a subject")
    add_aux_option(data)
    data.add_argument("--bands", type=band_numbers, metavar="I,J,..", help="bands of the cubes to take; default: all")
    data.add_argument("--wavelengths", type=wavelengths, metavar="NM,..", help="the same by nearest wavelength in nm")
    data.add_argument("--resample", type=wavelengths, metavar="NM,..", help="interpolate spectra at these nm instead")
    data.add_argument("--tile", type=int, metavar="PIXELS", help="cut cubes into squares, read one at a time")
    data.add_argument("--overlap", type=int, metavar="PIXELS", help="that neighbouring tiles share; default: 0")
    data.add_argument("--normalization", type=Path, metavar="FILE", help="statistics to read, or to write if not there")
    data.add_argument("--cache", type=Path, metavar="DIR", help="instead of --hsi: what `mmmae data cache` wrote")
    data.add_argument("--shards", type=Path, metavar="DIR", help="instead of --hsi: what `mmmae data shard` wrote")
    if not generated:
        return
    data.add_argument("--subjects", type=int, metavar="N", help="how many to generate; default: 64")
    data.add_argument(
        "--missing", type=float, metavar="P", help="probability that an image of a generated subject is missing"
    )


def add_aux_option(parser: argparse._ActionsContainer) -> None:
    """Declare --aux, which `aux_folders` reads."""
    parser.add_argument(
        "--aux",
        action="append",
        default=[],
        metavar="NAME=DIR[:BANDS]",
        help="folder of auxiliary images of the same file stems; :0 or :0,2 picks bands; may be repeated",
    )


def subjects_of(options: argparse.Namespace, preset: str, fields: dict[str, Any], seed: int) -> Subjects:
    """The data set that the data options name, or generated subjects, at the size that preset and fields give."""
    for field, source in (("aux", "--aux"), ("in_channels", "cubes, which have one")):
        if field in fields:
            raise ValueError(f"--set {field} can't be chosen: it follows from {source}")
    if not names_data(options):
        config = MMMAEConfig.preset(preset, **fields)
        return open_subjects(options, config.image_size, config.bands, seed=seed)
    if "bands" in fields:
        raise ValueError("--set bands can't be chosen: it follows from the cubes, or from --bands")
    patch = fields.get("patch")
    bands = patch[0] if isinstance(patch, list) and patch else MMMAEConfig.preset(preset).patch[0]
    known = {field: value for field, value in fields.items() if field != "wavelengths"}  # as many as the files' bands
    config = MMMAEConfig.preset(preset, **known, bands=bands)  # all but what the files tell
    stored = options.out / "normalization.json"
    return open_subjects(options, config.image_size, normalization=stored if options.resume else None)


def subjects_for(options: argparse.Namespace, config: MMMAEConfig, *, normalization: Path | None = None) -> Subjects:
    """The data set that the data options name, as a trained encoder takes it.

    Args:
        options: parsed from what `add_data_options` declares, with `generated=False`.
        config: the encoder's; cubes are read at its `image_size`. Their number of bands is for the caller to compare.
        normalization: the statistics that the encoder was trained with; taken if the file is there and
            --normalization names no other.
    """
    return open_subjects(options, config.image_size, normalization=normalization)


def names_data(options: argparse.Namespace) -> bool:
    """Whether --hsi, --cache or --shards is given; without them subjects are generated."""
    return any(getattr(options, source) is not None for source in SOURCES)


def open_subjects(
    options: argparse.Namespace,
    image_size: int | None,
    bands: int = 12,
    *,
    seed: int = 0,
    normalization: Path | None = None,
) -> Subjects:
    """The data set of the data options.

    Args:
        options: parsed from what `add_data_options` declares.
        image_size: of the samples; None leaves those of files as they are.
        bands, seed: of generated subjects.
        normalization: statistics for files where the options name none; not used if the file is not there.

    Raises:
        ValueError: two options exclude each other, or one needs another (names both), or the data do not fit.
    """
    from ..data import CachedSubjects, PairedFolder, ShardedSubjects
    from ..phantom import Phantom

    _check_combination(options)
    if options.hsi is not None:
        stored = normalization if normalization is not None and normalization.exists() else None
        return PairedFolder(
            options.hsi,
            aux_folders(options),
            image_size=image_size,
            bands=options.bands,
            wavelengths=options.wavelengths,
            resample=options.resample,
            tile=options.tile,
            overlap=options.overlap or 0,
            normalization=options.normalization or stored,
        )
    if options.cache is None and options.shards is None:
        chosen = {"length": options.subjects, "missing": options.missing}
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        return Phantom(image_size=image_size or 224, bands=bands, seed=seed, **given)
    subjects = CachedSubjects(options.cache) if options.cache is not None else ShardedSubjects(options.shards)
    if image_size is not None and subjects.image_size != (image_size, image_size):
        height, width = subjects.image_size
        raise ValueError(
            f"{options.cache or options.shards} holds cubes of {height} x {width}, expected {image_size} x "
            f"{image_size}: write it with --image-size {image_size}, or choose another image_size for the model"
        )
    return subjects


def _check_combination(options: argparse.Namespace) -> None:
    named = [f"--{source}" for source in SOURCES if getattr(options, source) is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} exclude each other; expected one of them")
    for option in ("aux", "bands", "wavelengths", "resample", "tile", "overlap", "normalization"):
        if getattr(options, option) not in (None, []) and options.hsi is None:
            raise ValueError(f"--{option} needs --hsi, the folder of cubes" + (f", not {named[0]}" if named else ""))
    for option in ("subjects", "missing"):
        if getattr(options, option) is not None and named:
            raise ValueError(f"--{option} is for generated subjects, it can't stand with {named[0]}")
    spectral = [f"--{name}" for name in ("bands", "wavelengths", "resample") if getattr(options, name) is not None]
    if len(spectral) > 1:
        raise ValueError(f"{' and '.join(spectral)} exclude each other")
    if options.overlap is not None and options.tile is None:
        raise ValueError("--overlap needs --tile, the size of the tiles")
    if not named and not options.generated:
        raise ValueError("no data are named, expected --hsi, --cache or --shards")


def aux_folders(options: argparse.Namespace) -> dict[str, str]:
    """Modality -> folder and bands, from --aux; a ValueError if a model could not have a modality of that name."""
    folders: dict[str, str] = {}
    for item in options.aux:
        name, _, folder = item.partition("=")
        if not name or not folder:
            raise ValueError(f"--aux is {item!r}, expected NAME=DIR or NAME=DIR:BANDS")
        if name in folders:
            raise ValueError(f"--aux names {name!r} twice")
        folders[name] = folder
    try:
        MMMAEConfig(aux=dict.fromkeys(folders, 1))
    except ValueError as error:
        raise ValueError(f"--aux: {error}") from error
    return folders


def config_fields(items: Sequence[str]) -> dict[str, Any]:
    """Config fields from FIELD=VALUE, the value as JSON or else as a word."""
    fields: dict[str, Any] = {}
    for item in items:
        field, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set is {item!r}, expected FIELD=VALUE")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError:
            fields[field] = value
    return fields


def band_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers of bands like 3,7, not {text!r}") from None


def wavelengths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected wavelengths in nm like 550,612.5, not {text!r}") from None


def process_count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, not {text!r}")
    return int(text)

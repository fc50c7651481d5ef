"""Options that several commands have in common: which data, and which fields of a config."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..config import MMMAEConfig

if TYPE_CHECKING:
    from ..recipes.sampling import Subjects

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name a data set."""
    data = parser.add_argument_group("data")
    data.add_argument("--hsi", type=Path, metavar="DIR", help="folder of hyperspectral cubes, one file a subject")
    data.add_argument(
        "--aux",
        action="append",
        default=[],
        metavar="NAME=DIR[:BANDS]",
        help="folder of auxiliary images of the same file stems; :0 or :0,2 picks bands; may be repeated",
    )
    data.add_argument("--bands", type=band_numbers, metavar="I,J,..", help="bands of the cubes to take; default: all")
    data.add_argument("--wavelengths", type=wavelengths, metavar="NM,..", help="the same by wavelength in nm")
    data.add_argument("--normalization", type=Path, metavar="FILE", help="statistics to read, or to write if not there")


def subjects_of(options: argparse.Namespace, preset: str, fields: dict[str, Any], seed: int) -> Subjects:
    """The data set that the data options name, or generated subjects, at the size that preset and fields give."""
    from ..data import PairedFolder, Phantom

    for field, source in (("aux", "--aux"), ("in_channels", "cubes, which have one")):
        if field in fields:
            raise ValueError(f"--set {field} can't be chosen: it follows from {source}")
    if options.hsi is None:
        for option in ("aux", "bands", "wavelengths", "normalization"):
            if getattr(options, option):
                raise ValueError(f"--{option} needs --hsi, the folder of cubes")
        config = MMMAEConfig.preset(preset, **fields)
        return Phantom(image_size=config.image_size, bands=config.bands, seed=seed)
    if "bands" in fields:
        raise ValueError("--set bands can't be chosen: it follows from the cubes, or from --bands")
    patch = fields.get("patch")
    bands = patch[0] if isinstance(patch, list) and patch else MMMAEConfig.preset(preset).patch[0]
    config = MMMAEConfig.preset(preset, **fields, bands=bands)  # all but the bands, which the files tell
    aux = {}
    for item in options.aux:
        name, _, folder = item.partition("=")
        if not name or not folder:
            raise ValueError(f"--aux is {item!r}, expected is NAME=DIR or NAME=DIR:BANDS")
        if name in aux:
            raise ValueError(f"--aux names {name!r} twice")
        aux[name] = folder
    config.replace(aux=dict.fromkeys(aux, 1))  # raises if a name can't be registered
    stored = options.out / "normalization.json"
    return PairedFolder(
        options.hsi,
        aux,
        image_size=config.image_size,
        bands=options.bands,
        wavelengths=options.wavelengths,
        normalization=options.normalization or (stored if options.resume and stored.exists() else None),
    )


def config_fields(items: Sequence[str]) -> dict[str, Any]:
    """Config fields from FIELD=VALUE, the value as JSON or else as a word."""
    fields: dict[str, Any] = {}
    for item in items:
        field, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set is {item!r}, expected is FIELD=VALUE")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError:
            fields[field] = value
    return fields


def band_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def wavelengths(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))

"""Options that several commands have in common, and what they stand for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro
from tyro.conf import UseAppendAction

from ..config import MMMAEConfig

if TYPE_CHECKING:
    from ..data.subjects import Subjects

Flag: TypeAlias = tyro.conf.FlagCreatePairsOff[bool]  # without a --no-flag
Fields: TypeAlias = Annotated[UseAppendAction[list[str]], tyro.conf.arg(name="set", metavar="FIELD=VALUE")]
Aux: TypeAlias = Annotated[UseAppendAction[list[str]], tyro.conf.arg(metavar="NAME=DIR[:BANDS]")]

SOURCES = ("hsi", "cache", "shards")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The data set.

    Args:
        hsi: folder of hyperspectral cubes, one file per subject
        aux: folder of auxiliary images with the file stems of the cubes; :0 or :0,2 picks bands
        bands: bands of the cubes to take; None: all
        wavelengths: the same, by the nearest wavelength in nm
        resample: wavelengths in nm to interpolate spectra at, instead
        tile: cut cubes into squares of this many pixels, read one at a time
        overlap: pixels that neighbouring tiles share; None: 0
        normalization: statistics to read, or to write if the file does not exist
        cache: instead of --hsi: the folder that `mmmae data cache` wrote
        shards: instead of --hsi: the folder that `mmmae data shard` wrote
    """

    hsi: Path | None = None
    aux: Aux = dataclasses.field(default_factory=list)
    bands: tuple[int, ...] | None = None
    wavelengths: tuple[float, ...] | None = None
    resample: tuple[float, ...] | None = None
    tile: int | None = None
    overlap: int | None = None
    normalization: Path | None = None
    cache: Path | None = None
    shards: Path | None = None

    @property
    def is_named(self) -> bool:
        """Whether --hsi, --cache or --shards is given."""
        return any(getattr(self, source) is not None for source in SOURCES)


@dataclasses.dataclass(frozen=True)
class GeneratedOptions:
    """Generated subjects, where no data set is named.

    Args:
        subjects: how many to generate; None: 64
        missing: probability that an auxiliary image of a subject is missing
    """

    subjects: int | None = None
    missing: float | None = None


def open_subjects(
    data: DataOptions,
    image_size: int | None,
    bands: int = 12,
    *,
    generated: GeneratedOptions | None = None,
    seed: int = 0,
    normalization: Path | None = None,
) -> Subjects:
    """Open the data set that the options name.

    Args:
        data: the options.
        image_size: height and width of the samples; None leaves those of files as they are.
        bands: bands of generated subjects.
        generated: options of generated subjects; None: subjects are never generated.
        seed: seed of generated subjects.
        normalization: statistics for files where the options name none; ignored if the file does not exist.

    Raises:
        ValueError: two options exclude each other, or one needs another (the message names both), or the data do not
            fit.
    """
    from ..data import CachedSubjects, PairedFolder, ShardedSubjects

    _check_combination(data, generated)
    if data.hsi is not None:
        stored = normalization if normalization is not None and normalization.exists() else None
        return PairedFolder(
            data.hsi,
            aux_folders(data.aux),
            image_size=image_size,
            bands=data.bands,
            wavelengths=data.wavelengths,
            resample=data.resample,
            tile=data.tile,
            overlap=data.overlap or 0,
            normalization=data.normalization or stored,
        )
    if data.cache is None and data.shards is None:
        from ..phantom import Phantom

        assert generated is not None
        chosen = {"length": generated.subjects, "missing": generated.missing}
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        return Phantom(image_size=image_size or 224, bands=bands, seed=seed, **given)
    folder = data.cache or data.shards
    assert folder is not None
    subjects = CachedSubjects(folder) if data.cache is not None else ShardedSubjects(folder)
    if image_size is not None and subjects.image_size != (image_size, image_size):
        height, width = subjects.image_size
        raise ValueError(
            f"{folder} holds cubes of {height} x {width}, expected {image_size} x {image_size}: write it with "
            f"--image-size {image_size}, or choose another image_size for the model"
        )
    return subjects


def _check_combination(data: DataOptions, generated: GeneratedOptions | None) -> None:
    named = [f"--{source}" for source in SOURCES if getattr(data, source) is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} exclude each other, expected one of them")
    for option in ("aux", "bands", "wavelengths", "resample", "tile", "overlap", "normalization"):
        if getattr(data, option) not in (None, []) and data.hsi is None:
            raise ValueError(f"--{option} needs --hsi, the folder of cubes" + (f", not {named[0]}" if named else ""))
    if generated is not None:
        for option in ("subjects", "missing"):
            if getattr(generated, option) is not None and named:
                raise ValueError(f"--{option} is for generated subjects, it can't be combined with {named[0]}")
    spectral = [f"--{name}" for name in ("bands", "wavelengths", "resample") if getattr(data, name) is not None]
    if len(spectral) > 1:
        raise ValueError(f"{' and '.join(spectral)} exclude each other")
    if data.overlap is not None and data.tile is None:
        raise ValueError("--overlap needs --tile, the size of the tiles")
    if not named and generated is None:
        raise ValueError("no data are named, expected --hsi, --cache or --shards")


def aux_folders(items: Sequence[str]) -> dict[str, str]:
    """Return the folder and bands of each modality that --aux names.

    Raises:
        ValueError: an item is not NAME=DIR or NAME=DIR:BANDS, or a model can't have a modality of that name.
    """
    folders: dict[str, str] = {}
    for item in items:
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
    """Return the config fields that --set gives as FIELD=VALUE.

    A value is JSON, a list without its brackets (`patch=3,8,8`), or else a word.
    """
    fields: dict[str, Any] = {}
    for item in items:
        field, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set is {item!r}, expected FIELD=VALUE")
        fields[field] = value
        for text in (value, f"[{value}]") if "," in value else (value,):
            try:
                fields[field] = json.loads(text)
                break
            except json.JSONDecodeError:
                continue
    return fields


def config_without_bands(preset: str, fields: Mapping[str, Any]) -> MMMAEConfig:
    """Return the config of a preset with some fields changed, before files say how many bands there are."""
    patch = fields.get("patch")
    bands = patch[0] if isinstance(patch, list) and patch else MMMAEConfig.preset(preset).patch[0]
    return MMMAEConfig.preset(preset, **fields, bands=bands)


def colours(rgb: tuple[int, ...] | None) -> tuple[int, int, int] | None:
    """Return the bands that --rgb names for red, green and blue; raise ValueError unless there are three."""
    if rgb is None:
        return None
    if len(rgb) != 3:
        raise ValueError(f"--rgb has {len(rgb)} bands, expected three")
    return rgb[0], rgb[1], rgb[2]

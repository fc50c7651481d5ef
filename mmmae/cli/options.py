"""Options that several commands have in common, and how their texts are read."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import docstring_parser
import tyro
from tyro.conf import UseAppendAction
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ..config import MMMAEConfig
from ..training.finetuning.settings import FinetuneSettings
from ..training.settings import PretrainSettings

if TYPE_CHECKING:
    from ..data.subjects import Subjects

Flag: TypeAlias = tyro.conf.FlagCreatePairsOff[bool]  # without a --no-flag
Fields: TypeAlias = Annotated[UseAppendAction[list[str]], tyro.conf.arg(name="set", metavar="FIELD=VALUE")]
Aux: TypeAlias = Annotated[UseAppendAction[list[str]], tyro.conf.arg(metavar="NAME=DIR[:BANDS]")]

SOURCES = ("hsi", "cache", "shards")

registry = ConstructorRegistry()


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


def colours(rgb: tuple[int, ...] | None) -> tuple[int, int, int] | None:
    """Return the bands that --rgb names for red, green and blue; raise ValueError unless there are three."""
    if rgb is None:
        return None
    if len(rgb) != 3:
        raise ValueError(f"--rgb has {len(rgb)} bands, expected three")
    return rgb[0], rgb[1], rgb[2]


@registry.struct_rule
def _settings(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Make options of the documented fields of settings, which are checked only when the command asks for them.

    A value that is not allowed is then reported in one line, as any other error of a command.
    """
    settings: Any = info.type
    if settings not in (PretrainSettings, FinetuneSettings):
        return None

    def later(**values: Any) -> Callable[[], Any]:
        return functools.partial(settings, **values)

    later.__doc__ = settings.__doc__
    kinds, meanings = typing.get_type_hints(settings), field_meanings(settings)
    return StructConstructorSpec(
        instantiate=later,
        fields=tuple(
            StructFieldSpec(field.name, kinds[field.name], field.default, meanings[field.name])
            for field in dataclasses.fields(settings)
        ),
    )


def field_meanings(documented: type) -> dict[str, str]:
    """Return the meaning of each field of a dataclass, from the arguments in its docstring."""
    arguments = docstring_parser.parse(documented.__doc__ or "").params
    return {argument.arg_name: " ".join((argument.description or "").split()) for argument in arguments}


@registry.primitive_rule
def _numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[tuple[float, ...]] | None:
    """Read a tuple of numbers from one text with commas."""
    kinds = [kind for kind in _alternatives(info.type) if kind is not types.NoneType]
    if len(kinds) != 1 or typing.get_origin(kinds[0]) is not tuple:
        return None
    number = typing.get_args(kinds[0])[0]
    example = "numbers of bands like 3,7" if number is int else "numbers like 550,612.5"

    def read(texts: list[str]) -> tuple[float, ...]:
        try:
            return tuple(number(part) for part in texts[0].split(","))
        except ValueError:
            raise ValueError(f"expected {example}, not {texts[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,...",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["None" if value is None else ",".join(map(str, value))],
    )


@registry.primitive_rule
def _mode(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool | str] | None:
    """Read true or one of several modes from an option with an optional word; `off` is false."""
    kinds = _alternatives(info.type)
    if len(kinds) != 2 or kinds[0] is not bool:
        return None
    modes = typing.get_args(kinds[1])

    def read(texts: list[str]) -> bool | str:
        if len(texts) > 1 or not {*texts} <= {*modes, "off"}:
            raise ValueError(f"expected nothing, off or one of {', '.join(modes)}, not {' '.join(texts)!r}")
        return texts != ["off"] and (texts[0] if texts else True)

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{{{','.join((*modes, 'off'))}}}]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (bool, str)),
        str_from_instance=lambda value: [value if isinstance(value, str) else "default" if value else "off"],
    )


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)

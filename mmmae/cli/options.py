"""Options that several commands have in common, and what they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro
from tyro.conf import UseAppendAction

from ..config import MMMAEConfig
from ..files import json_value

if TYPE_CHECKING:
    from ..data.readers.windows import Edges
    from ..data.subjects import Subjects

Flag: TypeAlias = tyro.conf.FlagCreatePairsOff[bool]  # without a --no-flag
Fields: TypeAlias = Annotated[UseAppendAction[list[str]], tyro.conf.arg(name="set", metavar="FIELD=VALUE")]
Aux: TypeAlias = Annotated[UseAppendAction[list[str]], tyro.conf.arg(metavar="NAME=DIR[:BANDS]")]

Readings: TypeAlias = Annotated[UseAppendAction[list[str]], tyro.conf.arg(metavar="[NAME=]VALUE")]

SOURCES = ("hsi", "cache", "shards")


@dataclasses.dataclass(frozen=True)
class ReadingOptions:
    """How files are read, where they do not tell or tell wrongly; NAME= before a value is for an auxiliary modality.

    Args:
        axes: order of the axes of arrays, as in HWT; of a TIFF file, what its pages, rows and columns are
        dataset: name of the array to read of several, or number of a TIFF file's page
        nodata: value, as files store it, that means nodata
        scale: factor of the values, instead of the scale and offset that files declare
    """

    axes: Readings = dataclasses.field(default_factory=list)
    dataset: Readings = dataclasses.field(default_factory=list)
    nodata: Readings = dataclasses.field(default_factory=list)
    scale: Readings = dataclasses.field(default_factory=list)

    def by_modality(self, modalities: Collection[str]) -> dict[str, Any]:
        """Return option -> modality -> value, "hsi" for the cubes.

        Raises:
            ValueError: an option is given twice, is for an unknown modality, or is no number.
        """
        kinds: dict[str, Callable[[str], Any]] = {"axes": str, "dataset": str, "nodata": float, "scale": float}
        return {option: _values(option, getattr(self, option), kind, modalities) for option, kind in kinds.items()}


@dataclasses.dataclass(frozen=True)
class DataOptions(ReadingOptions):
    """The data set.

    Args:
        hsi: folder of hyperspectral cubes, one file per subject; or one such file
        aux: folder of auxiliary images with the file stems of the cubes; :0 or :0,2 picks bands
        bands: bands of the cubes to take, as 0-189,213, or all in intervals, as 400-1340,1460-1790nm; None: all
        wavelengths: the same, by the nearest wavelength in nm, as 550,650; or a file of the wavelengths of all bands
        resample: wavelengths in nm to interpolate spectra at, instead
        tile: cut cubes into squares of this many pixels, read one at a time
        overlap: pixels that neighbouring tiles share; None: 0, for maps and rasters a quarter of a tile
        normalization: statistics to read, or to write if the file does not exist
        cache: instead of --hsi: the folder that `mmmae data cache` wrote
        shards: instead of --hsi: the folder that `mmmae data shard` wrote
    """

    hsi: Path | None = None
    aux: Aux = dataclasses.field(default_factory=list)
    bands: Annotated[str | None, tyro.conf.arg(metavar="N-N,...[nm]")] = None
    wavelengths: Annotated[str | None, tyro.conf.arg(metavar="NM,...|FILE")] = None
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
    band_multiple: int = 1,
    choice: Mapping[str, Any] | None = None,
    edges: Edges = "refuse",
) -> Subjects:
    """Open the data set that the options name.

    Args:
        data: the options.
        image_size: height and width of the samples; None leaves those of files as they are.
        bands: bands of generated subjects.
        generated: options of generated subjects; None: subjects are never generated.
        seed: seed of generated subjects.
        normalization: statistics for files where the options name none; ignored if the file does not exist.
        band_multiple: the last bands of files are left out, so that their number is a multiple of this.
        choice: bands where the options choose none, as arguments of `PairedFolder`.
        edges: what happens where tiles end, as in `PairedFolder`.

    Raises:
        ValueError: two options exclude each other, or one needs another (the message names both), or the data do not
            fit.
    """
    from ..data import CachedSubjects, PairedFolder, ShardedSubjects

    _check_combination(data, generated)
    if data.hsi is not None:
        stored = normalization if normalization is not None and normalization.exists() else None
        aux = aux_folders(data.aux)
        nearest, of_files = wavelengths_given(data.wavelengths)
        chosen_here: dict[str, Any] = {"bands": data.bands, "wavelengths": nearest, "resample": data.resample}
        if not any(chosen_here.values()):
            chosen_here.update(choice or {})
        return PairedFolder(
            data.hsi,
            aux,
            image_size=image_size,
            file_wavelengths=of_files,
            band_multiple=band_multiple,
            **chosen_here,
            **data.by_modality(["hsi", *aux]),
            tile=data.tile,
            overlap=data.overlap or 0,
            edges=edges,
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


def own_choice(statistics: Path | None) -> dict[str, Any]:
    """Return the bands on which statistics were measured, as arguments of `PairedFolder`; none if there is no file."""
    from ..data import Normalization
    from ..data.bands import described_choice

    if statistics is None or not statistics.exists():
        return {}
    return described_choice(Normalization.load(statistics).selection.get("hsi", ""))


def check_bands(subjects: Subjects, multiple: int) -> None:
    """Raise ValueError if subjects do not have as many bands as patches of `multiple` bands take."""
    if subjects.bands % multiple:
        raise ValueError(
            f"the data have {subjects.bands} bands, expected a multiple of the {multiple} of a patch: choose bands by "
            f"--bands, --wavelengths or --resample when cubes are read, or another patch by --set patch=..."
        )


def _check_combination(data: DataOptions, generated: GeneratedOptions | None) -> None:
    named = [f"--{source}" for source in SOURCES if getattr(data, source) is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} exclude each other, expected one of them")
    for option in (
        *("aux", "axes", "dataset", "nodata", "scale"),
        *("bands", "wavelengths", "resample", "tile", "overlap", "normalization"),
    ):
        if getattr(data, option) not in (None, []) and data.hsi is None:
            raise ValueError(f"--{option} needs --hsi, the folder of cubes" + (f", not {named[0]}" if named else ""))
    if generated is not None:
        for option in ("subjects", "missing"):
            if getattr(generated, option) is not None and named:
                raise ValueError(f"--{option} is for generated subjects, it can't be combined with {named[0]}")
    nearest, _ = wavelengths_given(data.wavelengths)
    chosen = {"bands": data.bands, "wavelengths": nearest, "resample": data.resample}
    spectral = [f"--{name}" for name, given in chosen.items() if given is not None]
    if len(spectral) > 1:
        raise ValueError(f"{' and '.join(spectral)} exclude each other")
    if data.overlap is not None and data.tile is None:
        raise ValueError("--overlap needs --tile, the size of the tiles")
    if not named and generated is None:
        raise ValueError("no data are named, expected --hsi, --cache or --shards")


def wavelengths_given(text: str | None) -> tuple[list[float] | None, list[float] | None]:
    """Return what --wavelengths gives: wavelengths of bands to take, or those of the files' bands.

    Raises:
        FileNotFoundError: it is neither numbers nor a file.
        ValueError: the file holds no wavelengths.
    """
    if text is None:
        return None, None
    try:
        return [float(part) for part in text.split(",")], None
    except ValueError:
        from ..data.readers.wavelength_files import read_wavelength_file

        return None, read_wavelength_file(Path(text))


def _values(
    option: str, items: Sequence[str], kind: Callable[[str], Any], modalities: Collection[str]
) -> dict[str, Any]:
    """Return modality -> value of an option that is given as VALUE, for the cubes, or as NAME=VALUE."""
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            name, text = "hsi", item
        if name not in modalities:
            raise ValueError(f"--{option} names {name!r}, expected one of {', '.join(modalities)}")
        if name in values:
            raise ValueError(f"--{option} is given twice for {name!r}")
        try:
            values[name] = kind(text)
        except ValueError:
            raise ValueError(f"--{option} is {item!r}, expected a number, or NAME=NUMBER for a modality") from None
    return values


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
                fields[field] = json_value(text)
                break
            except ValueError:  # a word
                continue
    return fields


def config_without_bands(preset: str, fields: Mapping[str, Any]) -> MMMAEConfig:
    """Return the config of a preset with some fields changed, before files say which bands and images there are.

    It has as many bands as one patch, masks nothing and has no auxiliary images, so that it is valid if `fields` can
    be.
    """
    patch = fields.get("patch")
    bands = patch[0] if isinstance(patch, list) and patch else MMMAEConfig.preset(preset).patch[0]
    return MMMAEConfig.preset(preset, **{**fields, "bands": bands, "mask_ratio": 0.0, "aux": {}})


def colours(rgb: tuple[int, ...] | None) -> tuple[int, int, int] | None:
    """Return the bands that --rgb names for red, green and blue; raise ValueError unless there are three."""
    if rgb is None:
        return None
    if len(rgb) != 3:
        raise ValueError(f"--rgb has {len(rgb)} bands, expected three")
    return rgb[0], rgb[1], rgb[2]

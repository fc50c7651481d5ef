"""Data for a trained model: normalised by its statistics, with the bands that it takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import MMMAEConfig
from .options import DataOptions, Flag, aux_folders, check_bands, open_subjects, own_choice
from .output import say

if TYPE_CHECKING:
    from ..data.readers.windows import Edges
    from ..data.subjects import Subjects
    from ..model.encoder import HSIEncoder

STATISTICS = "normalization.json"


@dataclasses.dataclass(frozen=True)
class TrainedDataOptions(DataOptions):
    """The data set.

    Args:
        adapt_normalization: measure the statistics of the input on these data, as after a change of sensor or site;
            default: those beside the model
    """

    adapt_normalization: Flag = False


def trained_subjects(
    data: TrainedDataOptions, config: MMMAEConfig, folder: Path | None, *, tiles: Edges | None = None
) -> Subjects:
    """Open data normalised for a trained model, and print where the statistics come from.

    Args:
        data: the options.
        config: the model's config.
        folder: the model's folder; its `normalization.json` is used unless the options say otherwise. None: none.
        tiles: leave tiles of files in their own size, with these edges; None resizes all images to the model's size.

    Raises:
        ValueError: options exclude each other, or statistics and data do not fit.
    """
    stored = folder / STATISTICS if folder is not None and (folder / STATISTICS).exists() else None
    how: dict[str, Any] = {"band_multiple": config.patch[0], "choice": own_choice(stored), "edges": tiles or "refuse"}
    size = config.image_size if tiles is None else None
    if data.adapt_normalization:
        if data.normalization is not None:
            raise ValueError("--adapt-normalization and --normalization exclude each other")
        if data.hsi is None:
            raise ValueError("--adapt-normalization needs --hsi: other data are normalised already")
        adapted, recalled = _read_as_stored(data, stored)
        print(f"statistics of the input: measured on these data{recalled}")
        return open_subjects(adapted, size, **how)
    try:
        subjects = open_subjects(data, size, normalization=stored, **how)
    except ValueError as error:
        hint = "; --adapt-normalization measures new ones" if stored is not None and str(stored) in str(error) else ""
        raise ValueError(f"{error}{hint}") from error
    if data.normalization is not None and not data.normalization.exists():
        say(f"statistics of the input: measured on these data, into {data.normalization}")
    elif data.normalization is not None:
        say(f"statistics of the input: {data.normalization}{_reading(subjects)}")
    elif stored is not None and data.hsi is not None:
        say(f"statistics of the input: {stored}{_reading(subjects)}")
    elif data.hsi is not None:
        reason = "" if folder is None else ", because there are none beside the model"
        print(f"statistics of the input: measured on these data{reason}")
    elif stored is not None:
        _compare(subjects, stored)
    check_bands(subjects, config.patch[0])
    return subjects


def load_encoder(
    data: TrainedDataOptions, folder: Path, window: int | None = None, *, tiles: Edges | None = None
) -> tuple[HSIEncoder, Subjects]:
    """Open the data for an encoder and load it; if they have other bands, its position embeddings are resized.

    For windows of so many pixels the encoder has their size, and the data keep their own. For `tiles` see
    `trained_subjects`.

    Raises:
        ValueError: files, options and data do not fit.
        FileNotFoundError: there is no encoder.
    """
    from ..model.encoder import HSIEncoder
    from ..model.pretrained import read_config

    if data.aux:
        raise ValueError("--aux is not used: an encoder takes hyperspectral cubes alone")
    config = read_config(folder)
    subjects = trained_subjects(data, config, folder, tiles=tiles if window is None else "refuse")
    changes = _other_bands(config, subjects)
    if changes:
        at = "" if "wavelengths" not in changes else " at other wavelengths"
        print(
            f"the encoder was trained on {config.bands} bands; its position embeddings are resized for "
            f"{subjects.bands}{at}"
        )
    if window is not None:
        changes["image_size"] = image_size_for(window, config.patch)
    return HSIEncoder.from_pretrained(folder, **changes), subjects


def image_size_for(window: int, patch: Sequence[int]) -> int:
    """Return the smallest image size, a multiple of the patch, that holds a window of so many pixels."""
    side = math.lcm(*patch[1:])
    return -(-window // side) * side


def _other_bands(config: MMMAEConfig, subjects: Subjects) -> dict[str, Any]:
    """Return the config fields that have to change for the subjects' bands."""
    found = subjects.wavelengths
    changes: dict[str, Any] = {} if subjects.bands == config.bands else {"bands": subjects.bands}
    if config.wavelengths is None:
        return changes
    if found is None:
        raise ValueError(
            f"the encoder knows its {config.bands} bands by wavelength; the {subjects.bands} of the data have none"
        )
    nm = tuple(float(wavelength) for wavelength in found)
    if changes or any(abs(ours - theirs) > 0.01 for ours, theirs in zip(nm, config.wavelengths, strict=True)):
        changes["wavelengths"] = nm
    return changes


def _read_as_stored(data: TrainedDataOptions, stored: Path | None) -> tuple[TrainedDataOptions, str]:
    """Return the options with the nodata and scale of the stored statistics where they give none, and say which."""
    from ..data import Normalization

    modalities = ["hsi", *aux_folders(data.aux)]
    given, recalled = data.by_modality(modalities), []
    options: dict[str, list[str]] = {"nodata": list(data.nodata), "scale": list(data.scale)}
    for modality, reading in Normalization.load(stored).reading.items() if stored is not None else ():
        for option, value in reading.items():
            if modality in modalities and modality not in given[option]:
                options[option].append(f"{modality}={value}")
                recalled.append(f"--{option} {modality}={value}")
    text = f", which are read with {' '.join(recalled)} as the model's were" if recalled else ""
    return dataclasses.replace(data, nodata=options["nodata"], scale=options["scale"]), text


def _reading(subjects: Subjects) -> str:
    """Return how files are read because the statistics were measured so, for a message."""
    from ..data.normalization import listed

    reading = subjects.normalization.reading.get("hsi")
    return f", with {listed(reading)}" if reading else ""


def _compare(subjects: Subjects, stored: Path) -> None:
    from ..data import Normalization

    if Normalization.load(stored).percentiles.get("hsi") != subjects.normalization.percentiles.get("hsi"):
        say(f"note: these data were normalised by other statistics than {stored}")

"""What commands on a trained model have in common: its statistics, and the data as it takes them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import MMMAEConfig
from .options import subjects_for

if TYPE_CHECKING:
    from ..data.subjects import Subjects
    from ..model.encoder import HSIEncoder

STATISTICS = "normalization.json"


def add_statistics_option(parser: argparse.ArgumentParser) -> None:
    """Declare the option that takes statistics of the input from the data at hand."""
    parser.add_argument(
        "--adapt-normalization",
        action="store_true",
        help="measure the statistics of the input on these data, as after a change of sensor or site; "
        "default: those beside the model",
    )


def trained_subjects(options: argparse.Namespace, config: MMMAEConfig, folder: Path | None) -> Subjects:
    """The data that the options name, normalised for a trained model, with a line that says by which statistics.

    Args:
        options: parsed from what `add_data_options` and `add_statistics_option` declare.
        config: the model's.
        folder: of the model; its `normalization.json` is taken unless the options say otherwise. None: there is none.

    Raises:
        ValueError: options exclude each other, or statistics and data do not fit.
    """
    stored = folder / STATISTICS if folder is not None and (folder / STATISTICS).exists() else None
    if options.adapt_normalization:
        if options.normalization is not None:
            raise ValueError("--adapt-normalization and --normalization exclude each other")
        if options.hsi is None:
            raise ValueError("--adapt-normalization needs --hsi: other data are normalised already")
        subjects = subjects_for(options, config)
        print("statistics of the input: measured on these data")
        return subjects
    try:
        subjects = subjects_for(options, config, normalization=stored)
    except ValueError as error:
        hint = "; --adapt-normalization measures new ones" if stored is not None and str(stored) in str(error) else ""
        raise ValueError(f"{error}{hint}") from error
    if options.normalization is not None:
        print(f"statistics of the input: {options.normalization}")
    elif stored is not None and options.hsi is not None:
        print(f"statistics of the input: {stored}")
    elif options.hsi is not None:
        print("statistics of the input: measured on these data, because there are none beside the model")
    elif stored is not None:
        _compare(subjects, stored)
    return subjects


def load_encoder(options: argparse.Namespace, folder: Path) -> tuple[HSIEncoder, Subjects]:
    """The encoder in a folder and the data for it; with other bands than it was trained on, its positions are resized.

    Raises:
        ValueError: files, options and data do not fit.
        FileNotFoundError: there is no encoder.
    """
    from ..model.encoder import HSIEncoder

    if options.aux:
        raise ValueError("--aux is not used: an encoder takes hyperspectral cubes alone")
    encoder = HSIEncoder.from_pretrained(folder)
    subjects = trained_subjects(options, encoder.config, folder)
    changes = _other_bands(encoder.config, subjects)
    if changes:
        at = "" if "wavelengths" not in changes else " at other wavelengths"
        print(
            f"the encoder was trained on {encoder.config.bands} bands; its positions become those of "
            f"{subjects.bands}{at}"
        )
        encoder = HSIEncoder.from_pretrained(folder, **changes)
    return encoder, subjects


def _other_bands(config: MMMAEConfig, subjects: Subjects) -> dict[str, Any]:
    """The config fields in which the subjects' bands are others than the encoder's."""
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


def _compare(subjects: Subjects, stored: Path) -> None:
    from ..data import Normalization

    if Normalization.load(stored).percentiles.get("hsi") != subjects.normalization.percentiles.get("hsi"):
        print(f"note: these data were normalised by other statistics than {stored}")

"""Pairing of files: images of one subject are matched by their stem."""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .readers.conversion import conversion
from .readers.cube import SUFFIXES
from .readers.envi import ENVI_DATA_SUFFIXES, envi_data_files, envi_header
from .readers.pictures import PICTURE_SUFFIXES

_FOLDER_AND_BANDS = re.compile(r"(?P<folder>.+):(?P<bands>\d+(?:,\d+)*)")


@dataclass(frozen=True)
class Modality:
    """The files of one modality.

    Attributes:
        folder: the folder of the files.
        bands: 0-based numbers of the bands to read from each, None for all.
        files: subject -> file.
    """

    folder: Path
    bands: tuple[int, ...] | None
    files: dict[str, Path]


def pair_files(
    hsi_dir: str | os.PathLike[str], aux: Mapping[str, str | os.PathLike[str]]
) -> tuple[Modality, dict[str, Modality]]:
    """List the hyperspectral files and, for each modality, the auxiliary files with the same stems.

    Auxiliary files without a hyperspectral file give one warning, unless one cube alone is named.

    Args:
        hsi_dir: folder of cubes, of which each is a subject; or the file of one.
        aux: modality -> "DIR", "DIR:0" or "DIR:0,2".

    Raises:
        ValueError: a folder does not exist, has no file of a known format, two files of one stem or a broken link, or
            no auxiliary file of a modality belongs to a subject.
    """
    hsi_dir = Path(hsi_dir)
    alone = _alone(hsi_dir)
    hsi = Modality(hsi_dir, None, _files_by_stem("hsi", hsi_dir) if alone is None else alone)
    paired: dict[str, Modality] = {}
    orphans: list[str] = []
    for name, location in aux.items():
        folder, bands = split_location(location)
        files = _files_by_stem(name, folder)
        paired[name] = Modality(folder, bands, {stem: path for stem, path in files.items() if stem in hsi.files})
        if not paired[name].files:
            raise ValueError(
                f"modality {name!r}: no file in {folder} has the stem of one in {hsi_dir} "
                f"(as in {next(iter(files.values())).name} and {next(iter(hsi.files.values())).name})"
            )
        orphans += [f"{name}: {path}" for stem, path in files.items() if stem not in hsi.files]
    if orphans and alone is None:
        more = f" and {len(orphans) - 5} more" if len(orphans) > 5 else ""
        warnings.warn(
            f"{len(orphans)} auxiliary files have no hyperspectral file of their stem in {hsi_dir} and are not used: "
            f"{', '.join(orphans[:5])}{more}",
            stacklevel=3,
        )
    return hsi, paired


def split_location(location: str | os.PathLike[str]) -> tuple[Path, tuple[int, ...] | None]:
    """Split "DIR", "DIR:0" or "DIR:0,2" into the folder and the bands; None for all bands."""
    match = _FOLDER_AND_BANDS.fullmatch(str(location))
    if match is None or Path(location).is_dir():
        return Path(location), None
    return Path(match["folder"]), tuple(int(band) for band in match["bands"].split(","))


def images_in(modality: str, folder: Path) -> list[tuple[str, Path]]:
    """List the image files of a folder with their stems, sorted by name; an ENVI pair is one.

    What stands beside another image of the same stem is no image: a header without ENVI data, and a PNG or JPEG file,
    which is a preview. A link that leads to no file is listed: no subject should be lost with a disk that is missing.

    Raises:
        ValueError: the folder does not exist or has no image.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"modality {modality!r}: the folder {folder} {what}")
    images = _images(folder)
    if not images:
        files = (path for path in sorted(folder.iterdir()) if path.is_file())
        way_out = next((f"; {path.name} {phrase}" for path in files if (phrase := conversion(path))), "")
        expected = f"expected files ending in {' '.join(SUFFIXES)}{way_out}"
        raise ValueError(f"modality {modality!r}: no image in {folder}, {expected}")
    return images


def cubes_in(place: Path) -> list[tuple[str, Path]]:
    """List the cubes of a folder as `images_in` does, or the one whose file is named."""
    alone = _alone(place)
    return images_in("hsi", place) if alone is None else list(alone.items())


def has_images(folder: Path) -> bool:
    """Return whether a folder has an image file."""
    return bool(_images(folder))


def _images(folder: Path) -> list[tuple[str, Path]]:
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    files = [path for path in paths if path.is_file() or broken_link(path) is not None]
    images = [(stem, path) for path in files if (stem := _stem(path)) is not None]
    with_image = {stem for stem, path in images if not _may_be_companion(path)}
    return [(stem, path) for stem, path in images if stem not in with_image or not _may_be_companion(path)]


def broken_link(path: Path) -> str | None:
    """Return what is wrong with a link that leads to no file; None for everything else."""
    if not path.is_symlink() or path.exists():
        return None
    return f"is a link to {os.readlink(path)}, which leads to no file"


def _files_by_stem(modality: str, folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for stem, path in images_in(modality, folder):
        if (reason := broken_link(path)) is not None:
            raise ValueError(f"modality {modality!r}, subject {stem!r}: {path} {reason}")
        if stem in files:
            raise ValueError(f"modality {modality!r}, subject {stem!r}: two files, {files[stem]} and {path}")
        files[stem] = path
    return files


def _alone(path: Path) -> dict[str, Path] | None:
    """Return the subject in a file, or in the ENVI pair that it belongs to; None if it is no file of an image."""
    if not path.is_file():
        return None
    header = envi_header(path) if path.suffix.lower() in ENVI_DATA_SUFFIXES else None
    stem = _stem(header or path)
    return None if stem is None else {stem: header or path}


def _may_be_companion(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in PICTURE_SUFFIXES or (suffix == ".hdr" and not envi_data_files(path))


def _stem(path: Path) -> str | None:
    """Return the subject's name, or None if the file is no image, or the data file of an ENVI pair with its header."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES or (suffix in ENVI_DATA_SUFFIXES and envi_header(path) is not None):
        return None
    stem = Path(path.stem)
    data_named_by_header = suffix == ".hdr" and stem.suffix.lower() in ENVI_DATA_SUFFIXES
    return stem.stem if data_named_by_header and path.with_suffix("").is_file() else stem.name

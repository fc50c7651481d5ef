"""Read wavelengths that a user gives in a file, because the files of the cubes do not tell them."""

import re
from pathlib import Path

import numpy as np

from .envi import read_header
from .wavelengths import to_nanometres


def read_wavelength_file(path: Path) -> list[float]:
    """Read the wavelengths of bands in nm from a text file, an ENVI header or a .npy file.

    A text file has one number for each band, with spaces, commas or line breaks between; what follows a # is a comment.
    Numbers without a unit that are all below 100 are micrometres.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected wavelengths in nm, or a file of them")
    unit = None
    try:
        if path.suffix.lower() == ".npy":
            numbers = np.load(path, allow_pickle=False).reshape(-1).astype(np.float64)
        elif path.suffix.lower() == ".hdr":
            fields = read_header(path)
            unit = fields.get("wavelength units")
            numbers = _numbers(fields.get("wavelength", ""))
        else:
            numbers = _numbers(re.sub(r"#.*", "", path.read_text(encoding="utf-8-sig")))
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path}: is no file of wavelengths: {error}") from error
    found = to_nanometres(numbers, unit)
    if found is None:
        raise ValueError(f"{path}: is no file of wavelengths: expected positive numbers in a unit of length")
    return [float(value) for value in found]


def header_note(image: Path) -> tuple[str, ...]:
    """Return a note on wavelengths in an ENVI header beside an image of another format, which are not read with it."""
    header = image.with_suffix(".hdr")
    try:
        listed = header.is_file() and bool(read_header(header).get("wavelength"))
    except (ValueError, OSError):
        listed = False
    what = f"the wavelengths in {header.name} are not used; give them by wavelengths= (--wavelengths {header.name})"
    return (what,) if listed else ()


def _numbers(text: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([float(part) for part in re.split(r"[\s,;]+", text) if part], dtype=np.float64)

"""Wavelengths in nanometres, whatever unit a file writes them in."""

import re

import numpy as np
import numpy.typing as npt

NANOMETRES = {
    "nanometers": 1.0, "nanometres": 1.0, "nanometer": 1.0, "nanometre": 1.0, "nm": 1.0,
    "micrometers": 1e3, "micrometres": 1e3, "micrometer": 1e3, "micrometre": 1e3,
    "microns": 1e3, "micron": 1e3, "um": 1e3, "\u00b5m": 1e3, "\u03bcm": 1e3,
    "millimeters": 1e6, "millimetres": 1e6, "mm": 1e6, "meters": 1e9, "metres": 1e9, "m": 1e9,
    "angstroms": 0.1, "angstrom": 0.1,
}  # fmt: skip
_UNIT_IN_TEXT = "|".join(sorted((re.escape(unit) for unit in NANOMETRES if len(unit) > 1), key=len, reverse=True))
_NUMBER_WITH_UNIT = re.compile(rf"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*({_UNIT_IN_TEXT})\b", re.IGNORECASE)


def to_nanometres(values: npt.ArrayLike, unit: str | None) -> npt.NDArray[np.float32] | None:
    """Convert `values` `[T]` to nm, or return None if they are not wavelengths.

    If the unit is missing or "unknown", values that are all below 100 are micrometres, others nanometres: no optical
    sensor has bands below 100 nm or beyond 100 um. Other units (wavenumber, GHz, index) and values that are not finite
    and positive give None.
    """
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0 or not np.isfinite(array).all() or (array <= 0).any():
        return None
    name = (unit or "").strip().lower()
    if name in ("", "unknown"):
        name = "um" if array.max() < 100 else "nm"
    return (array * NANOMETRES[name]).astype(np.float32) if name in NANOMETRES else None


def parse_wavelength(text: str) -> tuple[float, str] | None:
    """Find the first number in `text` with a unit of length: "Band 3 (0.55 um)" gives 0.55 and "um"; else None."""
    match = _NUMBER_WITH_UNIT.search(text)
    return (float(match[1]), match[2]) if match else None

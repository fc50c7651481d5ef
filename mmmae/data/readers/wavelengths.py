"""Wavelengths in nanometres, whatever unit a file writes them in and wherever it holds them."""

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .declared import numbers_in, plain
from .stored import StoredArrays, text

NANOMETRES = {
    "nanometers": 1.0, "nanometres": 1.0, "nanometer": 1.0, "nanometre": 1.0, "nm": 1.0,
    "micrometers": 1e3, "micrometres": 1e3, "micrometer": 1e3, "micrometre": 1e3,
    "microns": 1e3, "micron": 1e3, "um": 1e3, "\u00b5m": 1e3, "\u03bcm": 1e3,
    "millimeters": 1e6, "millimetres": 1e6, "mm": 1e6, "meters": 1e9, "metres": 1e9, "m": 1e9,
    "angstroms": 0.1, "angstrom": 0.1,
}  # fmt: skip
_UNIT_IN_TEXT = "|".join(sorted((re.escape(unit) for unit in NANOMETRES if len(unit) > 1), key=len, reverse=True))
_NUMBER = r"\d*\.?\d+(?:e[+-]?\d+)?"
_LABEL = r"(?P<label>\b(?:bands?|channels?|ch|b)[\s_#.]*)?"
_INTERVAL = rf"{_LABEL}(?<![\w.,])(?P<low>{_NUMBER})(?P<dash>\s*(?:-|\u2013|\.\.)\s*)"
_NUMBER_WITH_UNIT = re.compile(
    rf"(?:{_INTERVAL}|(?<![\d.,]))(?P<value>{_NUMBER})\s*(?P<unit>{_UNIT_IN_TEXT})\b", re.IGNORECASE
)

# The words of a name such as "center_wavelengths_nm"; other words, as in "good_wavelengths", make it something else.
_WAVELENGTH = {"wavelength", "wavelengths", "wl", "wvl", "wave", "waves", "lambda", "lambdas"}
_UNITS = {"nm", "um", "nanometers", "micrometers", "nanometres", "micrometres"}
_NEUTRAL = {"center", "centre", "centers", "centres", "central", "mean", "band", "bands", "list", "of", "3d", "sensor"}


class Vector(NamedTuple):
    """A vector that holds wavelengths, by its name.

    Attributes:
        name: of the array, or of the attribute.
        values: numbers in a unit.
        unit: as the file writes it, or None.
        distance: groups to go up and down from the array whose wavelengths are looked for; -1 for its own attribute.
        named: whether its name holds that of the array.
    """

    name: str
    values: npt.NDArray[np.float64]
    unit: str | None
    distance: tuple[int, int]
    named: bool

    def nanometres(self) -> npt.NDArray[np.float32] | None:
        """Return the values in nm, or None if their unit is not one of length."""
        return to_nanometres(self.values, self.unit)


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
    """Find a number in `text` with a unit of length: "Band 3 (0.55 um)" gives 0.55 and "um"; else None.

    An interval, "400-450 nm", gives its middle. Several wavelengths that differ, as of a centre and a width, give None.
    """
    found: list[tuple[float, str]] = []
    for match in _NUMBER_WITH_UNIT.finditer(text):
        value = float(match["value"])
        if match["low"] is not None:
            low, numbered = float(match["low"]), match["label"] and match["dash"].strip() != match["dash"]
            if low < value <= 3 * low and not numbered:  # "Band 300 - 550 nm" is no interval
                value = (low + value) / 2
        found.append((value, match["unit"]))
    nm = [value * NANOMETRES.get(unit.casefold(), 0) for value, unit in found]
    return found[0] if nm and max(nm) - min(nm) <= 1e-3 * max(nm) else None


def find_wavelengths(arrays: StoredArrays, name: str, lengths: Collection[int]) -> Vector | None:
    """Return the vector with the wavelengths of an array, or None if the file has none.

    The array's own attribute comes first, then the vector in the nearest group: its own and those in it, then the group
    above. What lies in the group of another cube, or is called after one, is that cube's.

    Args:
        arrays: those of the file.
        name: of the array.
        lengths: how many entries the vector may have.

    Raises:
        ValueError: several vectors are equally near and differ.
    """
    fitting = sorted(
        (vector for vector in wavelength_vectors(arrays, name) if len(vector.values) in lengths),
        key=lambda vector: (vector.distance, not vector.named),
    )
    if not fitting:
        return None
    first = fitting[0]
    for other in fitting[1:]:
        if (other.distance, other.named) == (first.distance, first.named):
            one, two = first.nanometres(), other.nanometres()
            if (one is None) != (two is None) or (one is not None and not np.array_equal(one, two)):  # type: ignore[arg-type]
                raise ValueError(
                    f"{first.name!r} and {other.name!r} could both be the wavelengths of {name!r}; give them by "
                    "wavelengths= (--wavelengths FILE)"
                )
    return first


def unread_wavelengths(arrays: StoredArrays, name: str) -> list[str]:
    """Return notes on what is called wavelengths of an array but holds no numbers, as texts do and cells of MATLAB."""
    found = [
        other
        for other, array in arrays.items()
        if other != name
        and not array.numeric
        and np.prod(array.shape, dtype=object) > 1
        and _is_wavelength(_words(other.rsplit("/", 1)[-1]), set(_words(name)))
    ]
    for key, value in arrays[name].attributes()[0].items():
        if _is_wavelength(_words(key), set()) and np.size(value) > 1:
            try:
                numbers_in(key, value)
            except ValueError:
                found.append(key)
    return [
        f"{what} holds no numbers and is not used; give wavelengths by wavelengths= (--wavelengths FILE)"
        for what in found
    ]


def wavelength_vectors(arrays: StoredArrays, name: str) -> Iterator[Vector]:
    """Yield the vectors of a file that hold wavelengths, except those of other cubes; raise if one must not be read."""
    group = _group(name)
    own_words = set(_words(name))
    others = {_group(other) for other, array in arrays.items() if array.numeric and len(array.shape) == 3} - {group}
    for level, attributes in enumerate(arrays[name].attributes()):
        yield from _in_attributes(attributes, (level - 1, -1))
    for other, array in arrays.items():
        words = _words(other.rsplit("/", 1)[-1])
        if not array.is_vector or not _is_wavelength(words, own_words):
            continue
        place = _group(other)
        shared = next((n for n in range(len(group), 0, -1) if group[:n] == place[:n]), 0)
        if any(place[:depth] in others for depth in range(shared + 1, len(place) + 1)):
            continue
        if array.refusal is not None:
            raise ValueError(array.refusal)
        own = array.attributes()[0]
        unit = next((text(value) for key, value in own.items() if plain(key) in ("units", "unit")), None)
        named = bool(own_words & set(words) - _NEUTRAL - _UNITS - _WAVELENGTH)
        distance = (len(group) - shared, len(place) - shared)
        values = np.asarray(array.read(...), np.float64).reshape(-1)
        yield Vector(other, values, unit or _unit(words), distance, named)


def _in_attributes(attributes: Any, distance: tuple[int, int]) -> Iterator[Vector]:
    for key, value in attributes.items():
        words = _words(key)
        if not _is_wavelength(words, set()):
            continue
        try:
            values = np.array(numbers_in(key, value), np.float64)
        except ValueError:
            continue
        if values.size < 2:
            continue
        unit = next((text(other) for name, other in attributes.items() if plain(name) in _unit_names(key)), None)
        yield Vector(key, values, unit or _unit(words), distance, False)


def _unit_names(key: str) -> set[str]:
    stem = plain(key).removesuffix("s")
    return {f"{stem}{plural}unit{end}" for plural in ("", "s") for end in ("", "s")}


def _is_wavelength(words: list[str], own: set[str]) -> bool:
    left = set(words) - _WAVELENGTH
    return len(left) < len(set(words)) and left <= _NEUTRAL | _UNITS | own


def _unit(words: list[str]) -> str | None:
    return next((word for word in words if word in _UNITS), None)


def _group(name: str) -> tuple[str, ...]:
    return tuple(name.split("/")[:-1])


def _words(name: str) -> list[str]:
    """Split a name at what is no letter or digit, and where small letters end: "bandWavelengths" has two words."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W_]+", parts.lower())

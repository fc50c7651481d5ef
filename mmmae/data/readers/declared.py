"""What a file declares about an array: the values that mean nodata, and how stored numbers become measured ones."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arrays import equal_to
from .stored import StoredArrays, text

# Names are compared without letter case and without what is no letter or digit: "_FillValue" is "fillvalue".
NODATA_NAMES = (
    "fillvalue", "missingvalue", "nodata", "nodatavalue", "dataignorevalue", "ignorevalue", "backgroundvalue",
    "invalidvalue",
)  # fmt: skip
SCALINGS = {"scalefactor": "scale_factor", "addoffset": "add_offset"}  # and how the CF conventions spell them
RANGES = {"validrange": 2, "validmin": 1, "validmax": 1}
NODATA_ALIKE = ("maskvalue", "nullvalue", "null")
UNUSED = {"scale": 1.0, "gain": 1.0, "offset": 0.0, **dict.fromkeys(NODATA_ALIKE)}  # and what changes nothing
NO_NUMBER = ("", "none", "null", "n/a", "na", "undefined")


class Scaling(NamedTuple):
    """A measured value is `scale` times the stored one plus `offset`; both are numbers or one for each band."""

    scale: float | npt.NDArray[np.float64] = 1.0
    offset: float | npt.NDArray[np.float64] = 0.0
    note: str = ""


def plain(name: str) -> str:
    """Return a name without what writers spell differently: letter case, spaces, underscores."""
    return re.sub(r"[\W_]", "", name).lower()


def declared_nodata(arrays: StoredArrays, name: str) -> tuple[list[float], list[str]]:
    """Return the stored values of an array that its file declares to mean nothing, and notes.

    They are declared by attributes of the array; else by an array of one number that has such a name, or by attributes
    of the nearest group that has one. The fill value that the array's writer chose is one besides.
    """
    array = arrays[name]
    own, *groups = array.attributes()
    beside = {
        other: entry.read(...)
        for other, entry in arrays.items()
        if other != name and entry.is_number and not entry.refusal and plain(other.rsplit("/", 1)[-1]) in NODATA_NAMES
    }
    notes: list[str] = []
    found = _nodata_among(own, notes)
    for place in (beside, *groups):
        found = found or _nodata_among(place, notes)
    if array.fill is not None:
        found.append(array.fill)
    if is_unsigned(own):
        bits = 8 * array.read(tuple(slice(0, 1) for _ in array.shape)).dtype.itemsize
        found = [value % 2**bits for value in found]
    return list(dict.fromkeys(found)), notes


def is_nodata(values: npt.NDArray[Any], declared: list[float]) -> npt.NDArray[np.bool_] | None:
    """Return where stored values mean nothing, or None if no value is declared so."""
    found: npt.NDArray[np.bool_] | None = None
    for value in declared:
        here = equal_to(values, value)
        found = here if found is None else found | here
    return found


def is_unsigned(attributes: Mapping[str, Any]) -> bool:
    """Return whether integers are stored as signed ones but meant without sign, as netCDF writes it."""
    return text(attributes.get("_Unsigned", "")).lower() == "true"


def declared_scaling(places: Sequence[Mapping[str, Any]], bands: int) -> Scaling:
    """Return the scale and offset that the nearest of the attributes of an array and its groups declare.

    `scale_factor` multiplies and `add_offset` is added, by the CF conventions. NEON's `Scale_Factor` divides: any other
    spelling divides if it is 1 or more, and multiplies below 1. Of several spellings the one of the conventions counts.

    Raises:
        ValueError: they are 0, not finite, or as many as neither 1 nor the bands.
    """
    for number, place in enumerate(places):
        attributes = _scalings(place)
        if not attributes:
            continue
        try:
            return _scaling(attributes, bands)
        except ValueError as error:
            if number == 0:
                raise
            return Scaling(note=f"that of a group is not used: {error}")  # it may be meant for other arrays
    return Scaling()


def _scaling(attributes: Mapping[str, Any], bands: int) -> Scaling:
    scale: float | npt.NDArray[np.float64] = 1.0
    offset: float | npt.NDArray[np.float64] = 0.0
    notes = []
    for name in attributes:
        numbers = np.array(numbers_in(name, attributes[name]), np.float64)
        if numbers.size not in (1, bands) or not np.isfinite(numbers).all():
            raise ValueError(
                f"attribute {name!r} is {shown(attributes[name])}, expected a number, or one for each band"
            )
        value: float | npt.NDArray[np.float64] = float(numbers[0]) if numbers.size == 1 else numbers
        if plain(name) == "addoffset":
            offset = value
            if (numbers != 0).any():
                notes.append(f"{_number(value)} is added to values ({name})")
            continue
        if (numbers == 0).any():
            raise ValueError(f"attribute {name!r} is 0, expected another number")
        divides = name != "scale_factor" and bool((np.abs(numbers) >= 1).all())
        scale = 1 / value if divides else value
        if (numbers != 1).any():
            notes.append(f"values are {'divided' if divides else 'multiplied'} by {_number(value)} ({name})")
    return Scaling(scale, offset, ", ".join(sorted(notes, reverse=True)))


def _scalings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that are a scale or an offset, one of each."""
    found: dict[str, str] = {}
    for name in attributes:
        if plain(name) in SCALINGS and found.get(plain(name)) != SCALINGS[plain(name)]:
            found[plain(name)] = name
    return {name: attributes[name] for name in found.values()}


def declared_range(attributes: Mapping[str, Any], values: np.dtype[Any], notes: list[str]) -> tuple[float, float]:
    """Return the least and the largest stored value that is valid, by the CF conventions; and note what is not used."""
    low, high = -math.inf, math.inf
    for name, value in attributes.items():
        key = plain(name)
        if key in UNUSED:
            if not _means_nothing(value, UNUSED[key]):
                hint = "nodata= (--nodata)" if key in NODATA_ALIKE else "scale= (--scale)"
                notes.append(f"{name} is {shown(value)} and not used; if it is meant for the values, give it by {hint}")
            continue
        if key not in RANGES:
            continue
        numbers = np.asarray(value)
        if numbers.dtype.kind not in "iuf" or numbers.size != RANGES[key] or not np.isfinite(numbers).all():
            notes.append(f"{name} is {shown(value)}, no number, and not used")
            continue
        if numbers.dtype.kind == "f" and values.kind in "iu":
            notes.append(f"{name} is {shown(value)}, of another type than the values, and not used")
            continue
        bounds = [float(number) for number in numbers.reshape(-1)]
        if is_unsigned(attributes) and values.kind == "i":
            bounds = [bound % 2 ** (8 * values.itemsize) for bound in bounds]
        low = low if key == "validmax" else max(low, bounds[0])
        high = high if key == "validmin" else min(high, bounds[-1])
        notes.append(f"values beyond {name} {shown(value)} are nodata")
    return low, high


def _means_nothing(value: Any, neutral: float | None) -> bool:
    try:
        return all(number == neutral for number in numbers_in("", value))
    except ValueError:
        return False


def numbers_in(name: str, value: Any) -> list[float]:
    """Return the numbers of an attribute, which may be stored as text; raise ValueError if it is other text."""
    array = np.asarray(value)
    if array.dtype.kind in "biuf":
        return list(array.reshape(-1).tolist())
    words = [word for item in array.reshape(-1) for word in re.split(r"[,;\s]+", text(item).strip("[](){} "))]
    try:
        return [float(word) for word in words if word.lower() not in NO_NUMBER]
    except ValueError:
        raise ValueError(f"attribute {name!r} is {shown(value)}, expected numbers") from None


def shown(value: Any) -> str:
    """Return an attribute for a message, shortened."""
    content = repr(text(value))
    return content if len(content) <= 60 else f"{content[:57]}..."


def _nodata_among(attributes: Mapping[str, Any], notes: list[str]) -> list[float]:
    """Return the numbers of all attributes with a name that means nodata; note those that are none."""
    found: list[float] = []
    for name, value in attributes.items():
        if plain(name.rsplit("/", 1)[-1]) in NODATA_NAMES:
            try:
                found += numbers_in(name, value)
            except ValueError:
                notes.append(f"{name} is {shown(value)}, no number, and not used")
    return found


def _number(value: float | npt.NDArray[np.float64]) -> str:
    return f"{value:g}" if isinstance(value, float) else "one number a band"

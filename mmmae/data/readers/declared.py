"""What a file declares about an array: the values that mean nodata, and how stored numbers become measured ones."""

import re
from collections.abc import Mapping
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

    They are declared by attributes of the array and by the fill value that its writer chose; else, by an array of one
    number that has such a name, or by attributes of the nearest group that has one.
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
    if array.fill is not None:
        found.append(array.fill)
    for place in (beside, *groups):
        found = found or _nodata_among(place, notes)
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


def declared_scaling(attributes: Mapping[str, Any], bands: int) -> Scaling:
    """Return the scale and offset that an array's attributes declare.

    `scale_factor` multiplies and `add_offset` is added, by the CF conventions. NEON's `Scale_Factor` divides: any other
    spelling divides if it is 1 or more, and multiplies below 1.

    Raises:
        ValueError: they are 0, not finite, or as many as neither 1 nor the bands.
    """
    scale: float | npt.NDArray[np.float64] = 1.0
    offset: float | npt.NDArray[np.float64] = 0.0
    notes = []
    for name in attributes:
        if plain(name) not in ("scalefactor", "addoffset"):
            continue
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

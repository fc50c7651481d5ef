"""What the reader of a format found in a file, before it becomes a cube."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

LARGE = 1e30  # beyond, a nodata value is often written with few digits, as in -3.40282e+38


class Reading(TypedDict, total=False):
    """Arguments of `read_cube` for what files do not tell, or tell wrongly."""

    dataset: str | None
    axes: str | None
    nodata: float | None
    scale: float | None
    wavelengths: Sequence[float] | None


class Arrays(NamedTuple):
    """The values of an image as its file stores them, and what the file says about them.

    Attributes:
        values: `[T, H, W]` of real numbers.
        wavelengths: `[T]` in nm, or None if the file does not tell.
        nodata: `[T, H, W]` where the file declares that nothing was measured, or None.
        scale, offset: numbers, or one for each band; `values * scale + offset` is what was measured.
        notes: phrases that say what was left out, scaled or dropped.
    """

    values: npt.NDArray[Any]
    wavelengths: npt.NDArray[np.float32] | None = None
    nodata: npt.NDArray[np.bool_] | None = None
    scale: float | npt.NDArray[np.float64] = 1.0
    offset: float | npt.NDArray[np.float64] = 0.0
    notes: tuple[str, ...] = ()


class ArraysLayout(NamedTuple):
    """Sizes (T, H, W), wavelengths and notes of the image that a reader would read."""

    shape: tuple[int, int, int]
    wavelengths: npt.NDArray[np.float32] | None = None
    notes: tuple[str, ...] = ()


def can_hold(dtype: np.dtype[Any], number: float) -> bool:
    """Return whether values of a type of integers, or of truth values, can be `number`."""
    if not math.isfinite(number) or number != int(number):
        return False
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return bool(low <= number <= high)


def equal_to(values: npt.NDArray[Any], nodata: float) -> npt.NDArray[np.bool_]:
    """Return where values are `nodata`, rounded to their type if they are floats; NaN equals NaN here.

    Doubles equal a fraction in float32 too: many were float32 before they were written.
    """
    none = np.zeros(values.shape, dtype=bool)
    if values.dtype.kind != "f":
        return np.asarray(values == int(nodata)) if can_hold(values.dtype, nodata) else none
    if math.isnan(nodata):
        return np.asarray(np.isnan(values))
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.dtype.type(nodata)
        if math.isinf(rounded) and not math.isinf(nodata):
            return none
        same = values == rounded
        if values.dtype.itemsize > 4 and not float(nodata).is_integer():
            same |= values == np.float32(nodata).astype(values.dtype)
        if LARGE < abs(nodata) < math.inf:
            same |= np.abs(values / rounded - 1) < 1e-5
    return np.asarray(same)

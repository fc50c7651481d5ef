"""What the reader of a format found in a file, before it becomes a cube."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


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


def equal_to(values: npt.NDArray[Any], nodata: float) -> npt.NDArray[np.bool_]:
    """Return where values are `nodata`, rounded to their type if they are floats; NaN equals NaN here."""
    if values.dtype.kind != "f":
        return np.asarray(values == nodata)
    if math.isnan(nodata):
        return np.isnan(values)
    with np.errstate(over="ignore"):
        rounded = values.dtype.type(nodata)
    return np.asarray(values == rounded) if np.isfinite(rounded) or math.isinf(nodata) else np.zeros(values.shape, bool)

"""Matrices of bands x pixels, with the size of the image beside them."""

from typing import NamedTuple

import numpy as np

from .declared import plain
from .stored import StoredArrays

_ROWS = ("nrow", "nrows", "row", "rows", "line", "lines", "nline", "nlines", "h", "height", "numrows", "nh", "imheight")
_COLUMNS = (
    "ncol", "ncols", "col", "cols", "column", "columns", "ncolumns", "sample", "samples", "nsamples", "w", "width",
    "numcols", "nw", "imwidth",
)  # fmt: skip
_BANDS = ("nband", "nbands", "bands", "band", "numbands", "l")


class Matrix(NamedTuple):
    """A matrix whose one axis is that of the bands and whose other runs through the pixels of an image."""

    bands_first: bool
    height: int
    width: int


def find_matrix(arrays: StoredArrays, name: str) -> Matrix | None:
    """Return how an array of two axes holds the pixels of an image by the numbers beside it, or None if it does not.

    Raises:
        ValueError: the numbers fit both of its axes.
    """
    sizes = arrays[name].shape
    height, width, bands = (_number(arrays, names) for names in (_ROWS, _COLUMNS, _BANDS))
    if height is None or width is None or (height, width) == sizes:
        return None
    fitting = [axis for axis in (0, 1) if sizes[axis] == height * width and bands in (None, sizes[1 - axis])]
    if len(fitting) == 2 and sizes[0] != 1:
        raise ValueError(f"both axes of array {name!r} {list(sizes)} could be its {height} x {width} pixels")
    return Matrix(fitting[0] == 1, height, width) if fitting else None


def _number(arrays: StoredArrays, names: tuple[str, ...]) -> int | None:
    """Return the whole number that one of the arrays called so holds; None if there is none, or several differ."""
    found = set()
    for name, array in arrays.items():
        if plain(name.rsplit("/", 1)[-1]) in names and array.is_number and not array.refusal:
            value = float(np.asarray(array.read(...)).reshape(-1)[0])
            if value >= 1 and value == int(value):
                found.add(int(value))
    return found.pop() if len(found) == 1 else None

"""Strips of an image: windows of whole rows by which a large file is read piece by piece, in bounded memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .readers.envi import ENVI_DATA_SUFFIXES, envi_pair
from .readers.formats import CONTAINER_SUFFIXES
from .readers.pictures import PICTURE_SUFFIXES
from .readers.windows import Window

VALUES_AT_ONCE = 2**24
RAW_VALUES_AT_ONCE = 2**22  # of files that are not compressed: few enough for memory that is used again for each strip
RAW_VALUES = 2**26  # of a file that is loaded as a whole before, as strips would be read piece by piece from a disk
CHUNKS_AT_ONCE = 4  # times as many values may be read at once, where a chunk would be decoded again for each strip


def strips_of(path: Path, shape: tuple[int, int, int]) -> Iterator[Window | None]:
    """Yield windows of whole rows with so many values that they fit in memory; one None if the whole image is read.

    Strips are whole rows of chunks, unless these are too large: no chunk is then decoded twice.
    """
    bands, height, width = shape
    raw = bands * height * width <= RAW_VALUES and _load_raw(path)
    rows = max(min(VALUES_AT_ONCE, RAW_VALUES_AT_ONCE if raw else VALUES_AT_ONCE) // (bands * width), 1)
    together = None if rows >= height else _rows_of_a_chunk(path, height)
    if together is None:
        yield None
        return
    if bands * width * together <= CHUNKS_AT_ONCE * VALUES_AT_ONCE:
        rows = max(rows // together, 1) * together
    for row in range(0, height, rows):
        yield Window(row, 0, min(rows, height - row), width)


def _load_raw(path: Path) -> bool:
    """Return whether a file is not compressed, and let the system load it in the order of its bytes."""
    suffix = path.suffix.lower()
    if suffix != ".npy" and suffix not in (".hdr", *ENVI_DATA_SUFFIXES):
        return False
    if hasattr(os, "posix_fadvise"):
        with (path if suffix == ".npy" else envi_pair(path)[1]).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    return True


def _rows_of_a_chunk(path: Path, height: int) -> int | None:
    """Return how many rows of an image are decoded together; None if the file is decoded as a whole."""
    suffix = path.suffix.lower()
    if suffix in (".npz", *PICTURE_SUFFIXES):
        return None
    if suffix not in CONTAINER_SUFFIXES or suffix == ".npy":
        return 1
    import h5py

    if not h5py.is_hdf5(path):  # MATLAB's before v7.3, netCDF 3
        return None
    rows = [1]

    def look(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim == 3 and item.chunks is not None:
            rows.extend(chunk for size, chunk in zip(item.shape, item.chunks, strict=True) if size == height)

    with h5py.File(path, "r") as file:
        file.visititems(look)
    return max(rows)

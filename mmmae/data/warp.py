"""Resample an image by position onto the grid of its cube, where it lies on another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .georeference import Georeference
from .readers.cube import Cube
from .readers.windows import Window

OFF = 0.5 + 1e-6  # pixels of the cube by which an image may be off and still lies where the cube does
TOLERANCE = 1e-9  # in pixels; at GDAL's 0.125 the values of a pixel depend on the window in which it is read
TURN = 0.01  # of a pixel a pixel, from which on an image is turned against its cube


class Warp(NamedTuple):
    """How an image is resampled onto the grid of its cube.

    Attributes:
        image, cube: their georeferences.
        differences: what the image has otherwise than the cube, as in "another extent and resolution".
        scale: the cube's pixels for a pixel of the image, along its columns and its rows, at most 1.
    """

    image: Georeference
    cube: Georeference
    differences: str
    scale: tuple[float, float]

    def read(self, read: Callable[[Window], Cube], window: Window | None = None, *, nearest: bool = False) -> Cube:
        """Read the pixels of an image that lie in a window of the cube, resampled onto the cube's grid.

        Bilinear resampling takes the mean of the pixels around, as many as the cube's pixel covers, and leaves out
        nodata. What the image does not cover is nodata.

        Args:
            read: function that reads a window of the image.
            window: in pixels of the cube; None for all.
            nearest: whether to take the value of the nearest pixel instead.
        """
        target = _part(self.cube, window or Window(0, 0, *self.cube.size))
        scale = (1.0, 1.0) if nearest else self.scale
        source = self._window_around(target, margin=2 + math.ceil(1 / min(scale)))
        cube = read(source)
        values = cube.values.masked_fill(cube.nodata, torch.nan).numpy()
        resampled = torch.from_numpy(_resample(values, _part(self.image, source), target, scale, nearest))
        nodata = resampled.isnan()
        return Cube(resampled.masked_fill_(nodata, 0.0), cube.wavelengths, nodata, cube.notes)

    def _window_around(self, target: Georeference, margin: int) -> Window:
        """Return the window of the image that lies in the target; at least one pixel, for the number of bands."""
        columns, rows = target.points_in(self.image, target.points())
        column, width = _covered(columns, self.image.width, margin)
        row, height = _covered(rows, self.image.height, margin)
        return Window(row, column, height, width)


def find_warp(image: Georeference | None, cube: Georeference | None, *, sizes_fit: bool = True) -> Warp | None:
    """Return how an image is resampled onto the grid of its cube.

    Args:
        image, cube: their georeferences, or None if they do not tell where they lie.
        sizes_fit: whether an image that covers the place of its cube can be used as it is.

    Returns:
        None if one of the two does not tell where it lies, or if the image can be used as it is: each of its points
        lies within half a pixel of the cube from where the sizes of both say.

    Raises:
        ValueError: they do not overlap.
    """
    if image is None or cube is None:
        return None
    points = image.points()
    here = image.points_in(cube, points)
    expected = points[0] * (cube.width / image.width), points[1] * (cube.height / image.height)
    same_place = bool((np.abs(np.subtract(here, expected)) <= OFF).all())
    if same_place and sizes_fit:
        return None
    if not cube.inside(here).any() and not image.inside(cube.points_in(image, cube.points())).any():
        column, row = (float(place[len(place) // 2]) for place in here)
        where = f"its centre is at column {column:.0f}, row {row:.0f} of the cube"
        if not math.isfinite(column + row):
            where = f"{image.crs_name} has no place in the cube's {cube.crs_name}"
        raise ValueError(f"does not overlap its cube: {where}")
    across, down = (1 / max(1.0, float(np.hypot(*steps))) for steps in _steps(cube, image))
    return Warp(image, cube, _differences(image, cube, same_place), (across, down))


def _differences(image: Georeference, cube: Georeference, same_place: bool) -> str:
    if image.crs != cube.crs:
        return f"another CRS, {image.crs_name}"
    (a, b), (d, e) = _steps(image, cube)
    found = []
    if min(a, e) <= 0 or max(abs(b), abs(d)) > TURN * max(abs(a), abs(e)):
        found.append("orientation")
    elif not same_place:
        found.append("extent")
    if not found or not np.allclose((np.hypot(a, d), np.hypot(b, e)), 1, rtol=1e-3):
        found.append("resolution")
    return f"another {' and '.join(found)}"


def _steps(source: Georeference, target: Georeference) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return by how many columns, and by how many rows of the target a column and a row of the source go on."""
    column, row = source.width / 2, source.height / 2
    columns, rows = source.points_in(target, (np.array([column, column + 1, column]), np.array([row, row, row + 1])))
    return (columns[1] - columns[0], columns[2] - columns[0]), (rows[1] - rows[0], rows[2] - rows[0])


def _covered(places: npt.NDArray[np.float64], side: int, margin: int) -> tuple[int, int]:
    """Return the first pixel and the number of pixels of a side that places on it cover, with a margin."""
    places = places[np.isfinite(places)]
    first, last = (math.floor(places.min()), math.ceil(places.max())) if places.size else (0, 0)
    start = min(max(first - margin, 0), side - 1)
    return start, max(min(last + margin, side) - start, 1)


def _part(image: Georeference, window: Window) -> Georeference:
    a, b, x, d, e, y = tuple(image.transform)[:6]
    row, column, height, width = window
    corner = type(image.transform)(a, b, a * column + b * row + x, d, e, d * column + e * row + y)
    return Georeference(image.crs, corner, height, width)


def _resample(
    values: npt.NDArray[np.float32],
    image: Georeference,
    target: Georeference,
    scale: tuple[float, float],
    nearest: bool,
) -> npt.NDArray[np.float32]:
    """Return the values `[T, H, W]` of an image on the grid of the target; NaN where nodata, in both."""
    from rasterio.enums import Resampling
    from rasterio.io import MemoryFile
    from rasterio.vrt import WarpedVRT

    options = {
        "resampling": Resampling.nearest if nearest else Resampling.bilinear,
        "tolerance": TOLERANCE,
        "XSCALE": repr(scale[0]),  # otherwise GDAL guesses it from the sizes of the windows
        "YSCALE": repr(scale[1]),
        "UNIFIED_SRC_NODATA": "NO",  # a band may be nodata where others are not
    }
    file = {"driver": "GTiff", "interleave": "band", "count": len(values), "dtype": "float32", "nodata": np.nan}
    with MemoryFile() as memory:
        with memory.open(**file, **_grid(image), BIGTIFF="IF_SAFER") as written:
            written.write(values)
        with memory.open() as source, WarpedVRT(source, **_grid(target), **options) as warped:
            return np.asarray(warped.read())


def _grid(image: Georeference) -> dict[str, Any]:
    return {"crs": image.crs, "transform": image.transform, "height": image.height, "width": image.width}

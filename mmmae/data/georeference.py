"""Where an image lies on the ground, and where its pixels lie in another image."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .readers.envi import ENVI_DATA_SUFFIXES, envi_pair
from .readers.rasters import TIFF_SUFFIXES

INTERVALS = 64  # between the points across an image whose places stand for those of all pixels
EDGE = 1e-3  # of a pixel, that belongs to neither of two images that touch

Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]  # columns and rows, or x and y


class Georeference(NamedTuple):
    """The place of an image.

    Attributes:
        crs: coordinate reference system, of rasterio, without heights.
        transform: (column, row) -> (x, y), an `Affine`; (0, 0) is the outer corner of the first pixel.
        height, width: in pixels.
    """

    crs: Any
    transform: Any
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def crs_name(self) -> str:
        """The EPSG code of the coordinate reference system, or else the beginning of its text."""
        code = self.crs.to_epsg()
        return f"EPSG:{code}" if code else str(self.crs.to_string())[:60]

    def points(self) -> Points:
        """Return columns and rows of a grid of points from edge to edge."""
        columns, rows = (np.linspace(0, side, min(max(side, 2), INTERVALS) + 1) for side in (self.width, self.height))
        grid = np.meshgrid(columns, rows)
        return grid[0].reshape(-1), grid[1].reshape(-1)

    def inside(self, points: Points) -> npt.NDArray[np.bool_]:
        """Return which points, as columns and rows, lie within the image and not on its edge."""
        columns, rows = points
        across = (columns > EDGE) & (columns < self.width - EDGE)
        return np.asarray(across & (rows > EDGE) & (rows < self.height - EDGE))

    def points_in(self, other: Georeference, points: Points) -> Points:
        """Return columns and rows in another image of points of this one.

        They are infinite where the reference system of the other image does not reach, and all of them are if one
        system can't be expressed in the other.
        """
        from rasterio.warp import transform

        x, y = _apply(self.transform, points)
        if self.crs != other.crs:
            try:
                x, y = (np.array(places) for places in transform(self.crs, other.crs, x, y))
            except Exception:  # of many classes, of which some are private to rasterio
                x = y = np.full(x.shape, np.inf)
        with np.errstate(invalid="ignore"):
            return _apply(~other.transform, (x, y))


def find_georeference(path: Path) -> Georeference | None:
    """Read the georeference of a GeoTIFF or ENVI file; None if it has none, or is of another format."""
    suffix = path.suffix.lower()
    if suffix in TIFF_SUFFIXES:
        name, driver = path, "GTiff"
    elif suffix == ".hdr" or suffix in ENVI_DATA_SUFFIXES:
        name, driver = envi_pair(path)[1], "ENVI"
    else:
        return None
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(name.absolute(), driver=driver) as source:
                crs, transform, height, width = source.crs, source.transform, source.height, source.width
        except RasterioIOError:  # our own readers say what is wrong with the file
            return None
    if not crs or transform.is_identity or transform.is_degenerate:
        return None
    return Georeference(_horizontal(crs), transform, height, width)


def _apply(transform: Any, points: Points) -> Points:
    a, b, c, d, e, f = tuple(transform)[:6]
    return a * points[0] + b * points[1] + c, d * points[0] + e * points[1] + f


def _horizontal(crs: Any) -> Any:
    """Return the horizontal part of a coordinate reference system that has heights too; of others, all."""
    wkt = crs.to_wkt()
    start = re.match(r'COMP(?:D_CS|OUNDCRS)\["(?:[^"]|"")*",', wkt)
    if start is None:
        return crs
    depth, quoted = 0, False
    for place, sign in enumerate(wkt[start.end() :], start=start.end()):
        quoted ^= sign == '"'
        depth += 0 if quoted else (sign == "[") - (sign == "]")
        if sign == "]" and depth == 0 and not quoted:
            return type(crs).from_wkt(wkt[start.end() : place + 1])
    return crs

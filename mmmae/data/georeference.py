"""Where an image lies on the ground, and whether another one covers the same place."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from .readers.envi import ENVI_DATA_SUFFIXES, envi_pair
from .readers.rasters import TIFF_SUFFIXES


class Georeference(NamedTuple):
    """The place of an image.

    Attributes:
        crs: coordinate reference system, of rasterio.
        corner: (x, y) of the outer corner of the first pixel, in units of `crs`.
        across: (x, y) from the first column to behind the last one.
        down: (x, y) from the first row to behind the last one.
        pixel: the longer side of a pixel.
    """

    crs: Any
    corner: tuple[float, float]
    across: tuple[float, float]
    down: tuple[float, float]
    pixel: float


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
    if not crs or transform.is_identity:
        return None
    a, b, x, d, e, y = tuple(transform)[:6]
    longer = max((a * a + d * d) ** 0.5, (b * b + e * e) ** 0.5)
    return Georeference(crs, (x, y), (a * width, d * width), (b * height, e * height), longer)


def elsewhere(image: Georeference | None, cube: Georeference | None) -> str | None:
    """Return why an image does not cover the place of its cube, as a phrase; None if it does, or if one has no place.

    Corners may differ by half a pixel, of the coarser image.
    """
    if image is None or cube is None:
        return None
    if image.crs != cube.crs and _horizontal(image.crs) != _horizontal(cube.crs):
        return f"lies in {_name(image.crs)}, its cube in {_name(cube.crs)}: reproject it to the cube's"
    allowed = max(image.pixel, cube.pixel) / 2
    turned = image.across[0] * cube.across[0] + image.across[1] * cube.across[1] < 0
    flipped = image.down[0] * cube.down[0] + image.down[1] * cube.down[1] < 0
    if turned or flipped:
        return "is turned against its cube: its rows or columns run the other way; warp it to the cube's grid"
    for what, corners in (("upper left", (image.corner, cube.corner)), ("lower right", (_end(image), _end(cube)))):
        (x, y), (cube_x, cube_y) = corners
        if max(abs(x - cube_x), abs(y - cube_y)) > allowed:
            return (
                f"covers another place than its cube: its {what} corner is at {x:.10g}, {y:.10g}, the cube's at "
                f"{cube_x:.10g}, {cube_y:.10g}; warp it to the cube's grid"
            )
    return None


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


def _end(place: Georeference) -> tuple[float, float]:
    (x, y), (across_x, across_y), (down_x, down_y) = place.corner, place.across, place.down
    return x + across_x + down_x, y + across_y + down_y


def _name(crs: Any) -> str:
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_string())[:60]

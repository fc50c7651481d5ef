"""Read PNG and JPEG files as arrays: grey values, colours, or the classes of pixels."""

import math
import os
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .arrays import Arrays, ArraysLayout
from .rasters import bands_layout, open_raster, read_bands
from .tiff_pages import MOST_COMPRESSED
from .windows import Window

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
DRIVERS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
PNG_START = b"\x89PNG\r\n\x1a\n"


def read_picture(path: Path, window: Window | None = None, *, classes: bool = False) -> Arrays:
    """Read the grey values or colours of a PNG or JPEG file, or a window of it; transparent pixels are nodata.

    Args:
        path: an existing file.
        window: the pixels to read; None for all.
        classes: whether the values are numbers of classes: those of a palette are read instead of its colours, equal
            channels are one band, and JPEG, which changes values, is refused.
    """
    name, driver, palette = _picture(path, classes)
    arrays = read_bands([name], driver, window, None, ())
    if palette is not None and not classes:
        colours = palette[arrays.values[0]]  # [H, W, 4]
        values = colours[..., : _shown(palette)].transpose(2, 0, 1)
        return Arrays(values, None, np.broadcast_to(colours[..., 3] == 0, values.shape))
    if palette is not None:  # a transparent colour says how its class is shown, not that there is none
        return arrays._replace(nodata=None)
    if classes and len(arrays.values) == 3 and (arrays.values == arrays.values[:1]).all():
        return Arrays(arrays.values[:1], None, None if arrays.nodata is None else arrays.nodata[:1])
    return arrays


def picture_layout(path: Path) -> ArraysLayout:
    """Read the sizes (T, H, W) of what `read_picture` would read, but no values."""
    name, driver, palette = _picture(path, False)
    layout = bands_layout([name], driver, None, ())
    return layout if palette is None else layout._replace(shape=(_shown(palette), *layout.shape[1:]))


def _picture(path: Path, classes: bool) -> tuple[str, str, npt.NDArray[np.uint8] | None]:
    """Return a picture's name and driver in GDAL, and the colours `[256, 4]` of its palette, if it has one."""
    from rasterio.enums import ColorInterp

    name, driver = os.path.abspath(path), DRIVERS[path.suffix.lower()]
    _check_whole(path.read_bytes(), driver)
    if classes and driver == "JPEG":
        raise ValueError("JPEG changes values, so that it can't hold numbers of classes: write PNG or TIFF")
    with open_raster(name, driver) as source:
        declared = math.prod(source.shape) * source.count * np.dtype(source.dtypes[0]).itemsize
        if declared > path.stat().st_size * MOST_COMPRESSED:
            raise ValueError(f"damaged: declares {declared} bytes of values in {path.stat().st_size} bytes")
        orientation = source.tags().get("EXIF_Orientation", "1")
        if orientation not in ("0", "1"):
            raise ValueError(f"the picture is turned or mirrored (EXIF orientation {orientation}): save it upright")
        if source.colorinterp[0] is not ColorInterp.palette:
            return name, driver, None
        colours = source.colormap(1)
        return name, driver, np.array([colours.get(number, (0, 0, 0, 0)) for number in range(256)], dtype=np.uint8)


def _check_whole(content: bytes, driver: str) -> None:
    """Raise ValueError for a file that is cut short or damaged: GDAL fills it with zeros without a word."""
    if driver == "JPEG":
        start_of_scan, end = content.rfind(b"\xff\xda"), content.rfind(b"\xff\xd9")
        if not content.startswith(b"\xff\xd8"):
            raise ValueError("is no JPEG file: its first bytes are others")
        if end <= start_of_scan:
            raise ValueError("truncated: the end of the picture is missing")
        return
    if not content.startswith(PNG_START):
        raise ValueError("is no PNG file: its first bytes are others")
    at, kind = len(PNG_START), b""
    while kind != b"IEND":
        length = int.from_bytes(content[at : at + 4], "big")
        kind, checksum = content[at + 4 : at + 8], content[at + 8 + length : at + 12 + length]
        if len(checksum) < 4:
            raise ValueError("truncated: the end of the picture is missing")
        if zlib.crc32(content[at + 4 : at + 8 + length]) != int.from_bytes(checksum, "big"):
            raise ValueError(f"damaged: the checksum of chunk {kind!r} is wrong")
        at += 12 + length


def _shown(palette: npt.NDArray[np.uint8]) -> int:
    """Return the channels of a palette: 1 if all of its colours are grey."""
    return 1 if (palette[:, :1] == palette[:, :3]).all() else 3

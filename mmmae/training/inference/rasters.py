"""GeoTIFF files written from top to bottom, with the place, the colours and the names of classes."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

from ...data.readers.envi import ENVI_DATA_SUFFIXES, envi_pair
from ...data.readers.rasters import TIFF_SUFFIXES
from ...files import write_atomically
from ...text import printable

BLOCK = 128  # side of the squares in which values are stored


class RasterWriter:
    """Writes a GeoTIFF from top to bottom, and holds the rows of the squares that are not complete yet.

    Args:
        target: a dataset of rasterio that is open for writing.
    """

    def __init__(self, target: Any) -> None:
        self.target, self.row = target, 0
        self.held: npt.NDArray[Any] = np.empty((target.count, 0, target.width), target.dtypes[0])

    def write(self, rows: npt.NDArray[Any]) -> None:
        """Write the next rows `[bands, n, width]`."""
        self.held = np.concatenate([self.held, rows.astype(self.held.dtype)], axis=1)
        self._flush(self.held.shape[1] // BLOCK * BLOCK)

    def close(self) -> None:
        """Write the rows that are held; raise ValueError if the raster is not complete then."""
        self._flush(self.held.shape[1])
        if self.row != self.target.height:
            raise ValueError(f"{self.row} rows were written, expected {self.target.height}")

    def _flush(self, count: int) -> None:
        if count:
            window = (self.row, self.row + count), (0, self.target.width)
            self.target.write(self.held[:, :count], window=window)
            self.held, self.row = self.held[:, count:], self.row + count


@contextlib.contextmanager
def open_raster(
    path: Path,
    bands: Sequence[str],
    size: tuple[int, int],
    dtype: str,
    nodata: float,
    place: Mapping[str, Any],
    tags: Mapping[str, Any] | None = None,
) -> Iterator[RasterWriter]:
    """Open a GeoTIFF for writing, of any suffix; it is complete after the block.

    Args:
        path: the file.
        bands: descriptions of the bands.
        size: (height, width).
        dtype: of the values.
        nodata: the value of pixels without data.
        place: what `find_place` returned.
        tags: further tags, which are written as JSON if they are not text; `colours`, value -> (red, green, blue) in
            0..1, becomes the colour table.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    tags = dict(tags or {})
    colours = tags.pop("colours", None)
    options = {"driver": "GTiff", "height": size[0], "width": size[1], "count": len(bands), "dtype": dtype}
    options |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "bigtiff": "if_safer"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path.absolute(), "w", nodata=nodata, **options) as target:
            if "gcps" in place:
                target.gcps = place["gcps"], place["crs"]
            elif place:
                target.crs, target.transform = place["crs"], place["transform"]
            for number, name in enumerate(bands, start=1):
                target.set_band_description(number, printable(name))
            target.update_tags(
                **{tag: text if isinstance(text, str) else json.dumps(text) for tag, text in tags.items()}
            )
            if colours is not None and dtype in ("uint8", "uint16"):
                table = {value: tuple(round(255 * part) for part in colour) for value, colour in colours.items()}
                target.write_colormap(1, {**table, int(nodata): (0, 0, 0, 0)})
            writer = RasterWriter(target)
            yield writer
            writer.close()


def find_place(path: Path | None, size: tuple[int, int], image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Return where a raster of an image lies: `crs` and `transform`, or `crs` and `gcps`; nothing if it is not known.

    Args:
        path: the image, a GeoTIFF or ENVI file; others, and None, have no place.
        size: (height, width) of the raster.
        image_size: of the image; None: the same.
    """
    down, across = (whole / part for whole, part in zip(image_size or size, size, strict=True))
    suffix = "" if path is None else path.suffix.lower()
    if path is None or suffix not in (*TIFF_SUFFIXES, ".hdr", *ENVI_DATA_SUFFIXES):
        return {}
    name, driver = (path, "GTiff") if suffix in TIFF_SUFFIXES else (envi_pair(path)[1], "ENVI")
    import rasterio
    from rasterio.control import GroundControlPoint
    from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
    from rasterio.transform import Affine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(name.absolute(), driver=driver) as source:
                crs, transform, (points, points_crs) = source.crs, source.transform, source.gcps
        except RasterioIOError:  # files that rasterio can't read have no place either
            return {}
    if points:
        scaled = [
            GroundControlPoint(point.row / down, point.col / across, point.x, point.y, point.z) for point in points
        ]
        return {"gcps": scaled, "crs": points_crs}
    if not crs and transform.is_identity:
        return {}
    a, b, x, d, e, y = tuple(transform)[:6]
    return {"crs": crs, "transform": Affine(a * across, b * down, x, d * across, e * down, y)}


def categories_path(path: Path) -> Path:
    """Return the file beside a raster in which GDAL and QGIS look for the names of its values."""
    return path.with_name(f"{path.name}.aux.xml")


def write_categories(path: Path, names: Mapping[int, str]) -> None:
    """Write the names of a raster's values beside it, in `categories_path`.

    Args:
        path: the raster.
        names: value -> name.
    """
    lines = [f"      <Category>{escape(printable(names.get(value, '')))}</Category>" for value in range(max(names) + 1)]
    text = "\n".join(
        [
            "<PAMDataset>",
            '  <PAMRasterBand band="1">',
            "    <CategoryNames>",
            *lines,
            "    </CategoryNames>",
            "  </PAMRasterBand>",
            "</PAMDataset>",
            "",
        ]
    )
    write_atomically(categories_path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))

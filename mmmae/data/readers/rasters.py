"""Read GeoTIFF and ENVI rasters as arrays `[T, H, W]`, with wavelengths and declared nodata."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Arrays, ArraysLayout
from .wavelengths import parse_wavelength, to_nanometres
from .windows import Window

TIFF_SUFFIXES = (".tif", ".tiff")
ENVI_DATA_SUFFIXES = (".img", ".dat", ".bsq", ".bil", ".bip", ".raw")


def read_raster(path: Path, window: Window | None = None) -> Arrays:
    """Read every band of a raster, or a window of it.

    Pixels that equal the declared nodata value or that the file's mask hides are nodata. An alpha band is a band, not a
    mask: writers tag the fourth band of any 8-bit file so.
    """
    from rasterio.enums import MaskFlags
    from rasterio.windows import Window as RasterWindow

    with _open(path) as source:
        place = None
        if window is not None:
            window.check_within(source.height, source.width)
            place = RasterWindow(window.column, window.row, window.width, window.height)
        values = source.read(window=place)
        nodata = np.zeros(values.shape, dtype=bool)
        for band, flags in enumerate(source.mask_flag_enums):
            if MaskFlags.all_valid not in flags and MaskFlags.alpha not in flags:
                nodata[band] = source.read_masks(band + 1, window=place) == 0
        return Arrays(values, _wavelengths(source), nodata, np.array(source.scales), np.array(source.offsets))


def raster_layout(path: Path) -> ArraysLayout:
    """Read the sizes (T, H, W) and the wavelengths of a raster, but no values."""
    with _open(path) as source:
        return ArraysLayout((source.count, source.height, source.width), _wavelengths(source))


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    tiff = path.suffix.lower() in TIFF_SUFFIXES
    data = path if tiff else envi_data_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        # An absolute path, because rasterio takes "s3:x.tif" for a URL; a driver, so that a file cannot choose its own.
        with rasterio.open(os.path.abspath(data), driver="GTiff" if tiff else "ENVI") as source:
            if any(dtype.startswith("complex") for dtype in source.dtypes):
                raise ValueError(f"the values are {source.dtypes[0]}, expected real numbers")
            if not tiff:
                _check_envi_complete(source.tags(ns="ENVI"), np.dtype(source.dtypes[0]).itemsize, data)
            yield source


def envi_header(path: Path) -> Path | None:
    """Find the header of an ENVI data file, `cube.hdr` or `cube.img.hdr` for `cube.img`; None if there is none."""
    candidates = [path.with_name(stem + suffix) for stem in (path.stem, path.name) for suffix in (".hdr", ".HDR")]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def envi_data_file(path: Path) -> Path:
    """Find the data file of an ENVI pair by its header or itself; raise ValueError if there is no such pair."""
    if path.suffix.lower() != ".hdr":
        header = envi_header(path)
        if header is None:
            raise ValueError(f"no ENVI header beside it, expected {path.with_suffix('.hdr').name}")
        data = path
    else:
        header = path
        suffixes = ["", *(s for suffix in ENVI_DATA_SUFFIXES for s in (suffix, suffix.upper()))]
        candidates = [path.with_suffix(suffix) for suffix in suffixes]
        # By inode: where letter case does not count, cube.img and cube.IMG are one file.
        found = list({candidate.stat().st_ino: candidate for candidate in candidates if candidate.is_file()}.values())
        if len(found) != 1:
            names = ", ".join(candidate.name for candidate in found) or "none"
            expected = ", ".join(ENVI_DATA_SUFFIXES)
            raise ValueError(f"expected one data file beside this ENVI header ({expected} or no suffix), found {names}")
        data = found[0]
    text = header.read_text(encoding="latin-1")
    if text.count("{") != text.count("}"):
        raise ValueError(f"the ENVI header {header.name} is truncated: a list in braces does not end")
    return data


def _check_envi_complete(header: dict[str, str], itemsize: int, data: Path) -> None:
    """Raise ValueError if data or header are incomplete: GDAL fills with zeros and guesses without a word."""
    missing = [key for key in ("samples", "lines", "bands", "data_type", "interleave") if key not in header]
    if missing:
        raise ValueError(f"the ENVI header lacks {', '.join(key.replace('_', ' ') for key in missing)}")
    if header.get("file_compression", "0") not in ("", "0"):
        raise ValueError("compressed ENVI files are not supported")
    listed = [part for part in header.get("wavelength", "").strip("{} ").split(",") if part.strip()]
    if listed and len(listed) != int(header["bands"]):
        raise ValueError(f"the ENVI header lists {len(listed)} wavelengths for {header['bands']} bands")
    pixels = int(header["samples"]) * int(header["lines"]) * int(header["bands"])
    expected = int(header.get("header_offset") or 0) + pixels * itemsize
    if data.stat().st_size < expected:
        raise ValueError(f"truncated: {data.name} has {data.stat().st_size} bytes, expected {expected} by its header")


def _wavelengths(source: Any) -> npt.NDArray[np.float32] | None:
    """Read wavelengths from band tags, else descriptions, else GDAL's IMAGERY domain (rounded to 1 nm, so last)."""
    dataset_unit = {key.lower(): text for key, text in source.tags().items()}.get("wavelength_units")
    values: list[float] = []
    for band, description in enumerate(source.descriptions, start=1):
        tags = {key.lower(): text for key, text in source.tags(band).items()}
        number, unit = tags.get("wavelength", ""), tags.get("wavelength_units", dataset_unit)
        imagery = source.tags(band, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM", "")
        parsed = parse_wavelength(number) or parse_wavelength(description or "")
        if _is_number(number):
            parsed = (float(number), unit or "")
        elif parsed is None and _is_number(imagery):
            parsed = (float(imagery), "um")
        value = to_nanometres(parsed[0], parsed[1]) if parsed else None
        if value is None:
            return None
        values.append(float(value[0]))
    return np.array(values, dtype=np.float32)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

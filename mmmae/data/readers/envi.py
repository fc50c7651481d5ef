"""Read ENVI rasters: a text header that describes a file of raw values."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arrays import Arrays, ArraysLayout, equal_to
from .wavelengths import parse_wavelength, to_nanometres
from .windows import Window

ENVI_DATA_SUFFIXES = (".img", ".dat", ".bsq", ".bil", ".bip", ".raw")

TYPES = {
    "1": "u1", "2": "i2", "3": "i4", "4": "f4", "5": "f8", "12": "u2", "13": "u4", "14": "i8", "15": "u8",
}  # fmt: skip
COMPLEX = ("6", "9")
ORDERS = {"bsq": "THW", "bil": "HTW", "bip": "HWT"}  # axes in the file
FILE_TYPES = ("envi standard", "envi classification", "envi", "")
REQUIRED = ("samples", "lines", "bands", "data type", "interleave")


class _Raster(NamedTuple):
    """What a header tells of its data file."""

    data: Path
    shape: tuple[int, int, int]
    axes: str
    dtype: np.dtype[Any]
    start: int
    wavelengths: npt.NDArray[np.float32] | None
    nodata: float | None
    bad_bands: list[int]
    scale: npt.NDArray[np.float64] | float
    offset: npt.NDArray[np.float64] | float
    notes: tuple[str, ...]


def read_envi(path: Path, window: Window | None = None, wavelengths: npt.NDArray[np.float32] | None = None) -> Arrays:
    """Read an ENVI raster, or a window of it, by its header or its data file.

    Args:
        path: an existing file, of which the other of the pair is found by its name.
        window: the pixels to read; None for all. Nothing else is read.
        wavelengths: of the bands in nm, instead of those in the header.

    Raises:
        ValueError: the header is incomplete or contradicts itself or the size of the data file, or says that values are
            complex, compressed, in frames with gaps, or all bad.
    """
    raster = _describe(path, wavelengths)
    bands, height, width = raster.shape
    sizes = {"T": bands, "H": height, "W": width}
    in_file = tuple(sizes[axis] for axis in raster.axes)
    mapped = np.memmap(raster.data, raster.dtype, "r", raster.start, in_file)
    stored: npt.NDArray[Any] = mapped.transpose([raster.axes.index(axis) for axis in "THW"])
    if window is not None:
        window.check_within(height, width)
        stored = stored[(slice(None), *window.slices)]
    values = np.array(stored, dtype=raster.dtype.newbyteorder("="), order="C")
    nodata = np.zeros(values.shape, dtype=bool) if raster.nodata is None else equal_to(values, raster.nodata)
    nodata[raster.bad_bands] = True
    return Arrays(values, raster.wavelengths, nodata, raster.scale, raster.offset, raster.notes)


def envi_layout(path: Path, wavelengths: npt.NDArray[np.float32] | None = None) -> ArraysLayout:
    """Read the sizes (T, H, W) and the wavelengths of an ENVI raster, but no values."""
    raster = _describe(path, wavelengths)
    return ArraysLayout(raster.shape, raster.wavelengths, raster.notes)


def envi_header(path: Path) -> Path | None:
    """Find the header of an ENVI data file, `cube.hdr` or `cube.img.hdr` for `cube.img`; None if there is none."""
    candidates = [path.with_name(stem + suffix) for stem in (path.stem, path.name) for suffix in (".hdr", ".HDR")]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def envi_data_files(header: Path) -> list[Path]:
    """List the files beside a header that may hold its data."""
    suffixes = ["", *(s for suffix in ENVI_DATA_SUFFIXES for s in (suffix, suffix.upper()))]
    candidates = [header.with_suffix(suffix) for suffix in suffixes]
    # By inode: where letter case does not count, cube.img and cube.IMG are one file.
    return list({candidate.stat().st_ino: candidate for candidate in candidates if candidate.is_file()}.values())


def envi_pair(path: Path) -> tuple[Path, Path]:
    """Find header and data file by either of them; raise ValueError if there is no such pair."""
    if path.suffix.lower() != ".hdr":
        header = envi_header(path)
        if header is None:
            raise ValueError(f"no ENVI header beside it, expected {path.with_suffix('.hdr').name}")
        return header, path
    found = envi_data_files(path)
    if len(found) != 1:
        names = ", ".join(candidate.name for candidate in found) or "none"
        expected = ", ".join(ENVI_DATA_SUFFIXES)
        raise ValueError(f"expected one data file beside this ENVI header ({expected} or no suffix), found {names}")
    return path, found[0]


def read_header(path: Path) -> dict[str, str]:
    """Read the fields of an ENVI header by their names in lower case; lists without their braces.

    Lines that begin with a semicolon are comments. A list ends at the first line that ends with a brace and closes all.
    """
    lines = path.read_text(encoding="latin-1").removeprefix("\xef\xbb\xbf").splitlines()
    if not lines or lines[0].strip().upper() != "ENVI":
        raise ValueError(f"{path.name} is no ENVI header: its first line is not ENVI")
    fields: dict[str, str] = {}
    rest = iter(line for line in lines[1:] if not line.lstrip().startswith(";"))
    for line in rest:
        key, equals, value = line.partition("=")
        if not equals:
            continue
        name, value = " ".join(key.lower().replace("_", " ").split()), value.strip()
        if value.startswith("{"):
            while not value.endswith("}") or value.count("{") > value.count("}"):
                following = next(rest, None)
                if following is None:
                    raise ValueError(f"the ENVI header {path.name} is truncated: the list of {name!r} does not end")
                value = f"{value}\n{following.strip()}".rstrip()
            value = value[1:-1].strip()
            if name != "description" and re.search(r"[{}]", value):
                raise ValueError(f"in the ENVI header {path.name}, braces in the list of {name!r} do not match")
        if fields.setdefault(name, value) != value and name != "description":
            raise ValueError(f"the ENVI header {path.name} has {name!r} twice, with different values")
    return fields


def _describe(path: Path, given: npt.NDArray[np.float32] | None) -> _Raster:
    header, data = envi_pair(path)
    fields = read_header(header)
    if missing := [key for key in REQUIRED if not fields.get(key)]:
        raise ValueError(f"the ENVI header lacks {', '.join(missing)}")
    kind = fields.get("file type", "").lower()
    if kind not in FILE_TYPES:
        raise ValueError(f"the ENVI header says file type = {fields['file type']}, expected ENVI Standard")
    if fields.get("file compression", "0") not in ("", "0"):
        raise ValueError("compressed ENVI files are not supported")
    for key in ("major frame offsets", "minor frame offsets"):
        if any(number != 0 for number in _numbers(fields, key)):
            raise ValueError(f"the ENVI header declares {key}, which are not supported: write the raster without gaps")
    shape = (_size(fields, "bands"), _size(fields, "lines"), _size(fields, "samples"))
    dtype, axes = _dtype(fields), ORDERS.get(fields["interleave"].lower())
    if axes is None:
        raise ValueError(f"the ENVI header says interleave = {fields['interleave']}, expected bsq, bil or bip")
    start = _size(fields, "header offset", 0) if fields.get("header offset") else 0
    expected = start + math.prod(shape) * dtype.itemsize
    if data.stat().st_size < expected:
        raise ValueError(f"truncated: {data.name} has {data.stat().st_size} bytes, expected {expected} by its header")
    notes = _ignored(data, expected)
    nodata = _number(fields, "data ignore value")
    bad = _bad_bands(fields, shape[0], notes)
    scale, offset = _scaling(fields, shape[0], notes)
    wavelengths = _wavelengths(fields, shape[0], notes) if given is None else given
    return _Raster(data, shape, axes, dtype, start, wavelengths, nodata, bad, scale, offset, tuple(notes))


def _ignored(data: Path, expected: int) -> list[str]:
    """Return notes on bytes and declarations that are there, but that the header does not describe."""
    notes = []
    if more := data.stat().st_size - expected:
        notes.append(f"{data.name} has {more} bytes more than its header describes")
    beside = data.with_name(f"{data.name}.aux.xml")
    if beside.is_file() and re.search(
        "<(Scale|Offset|NoDataValue)>", beside.read_text(encoding="utf-8", errors="replace")
    ):
        notes.append(f"the scale, offset or nodata in {beside.name} is not used, only the ENVI header's")
    return notes


def _dtype(fields: dict[str, str]) -> np.dtype[Any]:
    code, order = fields["data type"], fields.get("byte order") or "0"
    if code in COMPLEX:
        raise ValueError("the values are complex, expected real numbers")
    if code not in TYPES:
        raise ValueError(f"the ENVI header says data type = {code}, expected one of {', '.join(TYPES)}")
    if order not in ("0", "1"):
        raise ValueError(f"the ENVI header says byte order = {order}, expected 0 or 1")
    return np.dtype(("<" if order == "0" else ">") + TYPES[code])


def _bad_bands(fields: dict[str, str], bands: int, notes: list[str]) -> list[int]:
    bad = [band for band, good in enumerate(_numbers(fields, "bbl", bands)) if good == 0]
    if bad and len(bad) == bands:
        raise ValueError("the ENVI header marks all bands as bad (bbl)")
    if bad:
        plural = "bands {} are" if len(bad) > 1 else "band {} is"
        notes.append(f"{plural.format(', '.join(map(str, bad)))} marked as bad (bbl)")
    return bad


def _scaling(
    fields: dict[str, str], bands: int, notes: list[str]
) -> tuple[npt.NDArray[np.float64] | float, npt.NDArray[np.float64] | float]:
    """Return scale and offset; those to reflectance come before those to radiance, as values have one of the units."""
    factor = _number(fields, "reflectance scale factor")
    if factor is not None and not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"the ENVI header says reflectance scale factor = {factor:g}, expected a positive number")
    declared: dict[str, tuple[npt.NDArray[np.float64] | float, npt.NDArray[np.float64] | float]] = {}
    for kind in ("data reflectance", "data"):
        gains, offsets = (_numbers(fields, f"{kind} {name} values", bands) for name in ("gain", "offset"))
        if not np.isfinite([*gains, *offsets]).all() or 0 in gains:
            raise ValueError(f"the ENVI header has {kind} gain or offset values that are 0 or not finite")
        if gains or offsets:
            scale, offset = np.array(gains or [1.0] * bands), np.array(offsets or [0.0] * bands)
            if (scale != 1).any() or (offset != 0).any():
                declared[f"{kind} gain and offset values"] = scale, offset
        if kind == "data reflectance" and factor not in (None, 1):
            assert factor is not None
            declared[f"reflectance scale factor {factor:g}"] = 1 / factor, 0.0
    for number, name in enumerate(declared):
        notes.append(f"values are {'not ' if number else ''}scaled by the header's {name}")
    return next(iter(declared.values()), (1.0, 0.0))


def _wavelengths(fields: dict[str, str], bands: int, notes: list[str]) -> npt.NDArray[np.float32] | None:
    """Return the header's wavelengths in nm, else those in the names of all bands, else None."""
    listed = _numbers(fields, "wavelength", bands)
    if listed:
        unit = fields.get("wavelength units")
        found = to_nanometres(listed, unit)
        if found is None:
            what = f"of unit {unit}" if unit else "not positive"
            notes.append(f"the header's wavelengths are {what} and are not used")
        return found
    names = [name.strip() for name in fields.get("band names", "").split(",")]
    parsed = [parse_wavelength(name) for name in names]
    if len(parsed) != bands or None in parsed:
        return None
    each = [to_nanometres(value, unit) for value, unit in filter(None, parsed)]
    return None if any(nm is None for nm in each) else np.concatenate([nm for nm in each if nm is not None])


def _size(fields: dict[str, str], key: str, least: int = 1) -> int:
    text = fields[key]
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"the ENVI header says {key} = {text}, expected a whole number >= {least}")
    return int(text)


def _number(fields: dict[str, str], key: str) -> float | None:
    return next(iter(_numbers(fields, key)), None)


def _numbers(fields: dict[str, str], key: str, count: int | None = None) -> list[float]:
    """Return the numbers that a field lists; none if it is empty or not there."""
    texts = [text.strip() for text in fields.get(key, "").rstrip(", \n").split(",")]
    if texts == [""]:
        return []
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        raise ValueError(f"the ENVI header has values of {key!r} that are not numbers") from None
    if count is not None and len(numbers) != count:
        what = "wavelengths" if key == "wavelength" else f"values of {key!r}"
        raise ValueError(f"the ENVI header lists {len(numbers)} {what} for {count} bands")
    return numbers

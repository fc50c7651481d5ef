"""Read a spectral cube, a window of it, or only its layout, from a file of any supported format."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .arrays import Arrays, can_hold, equal_to
from .containers import CONTAINER_SUFFIXES, container_layout, read_container
from .conversion import conversion
from .envi import ENVI_DATA_SUFFIXES, envi_layout, read_envi
from .pictures import PICTURE_SUFFIXES, picture_layout, read_picture
from .rasters import TIFF_SUFFIXES, read_tiff, tiff_layout
from .windows import Window

UNDECLARED = ", and the file does not declare them as nodata; say so by nodata= (--nodata nan)"
SUFFIXES = (*TIFF_SUFFIXES, ".hdr", *ENVI_DATA_SUFFIXES, *CONTAINER_SUFFIXES, *PICTURE_SUFFIXES)


class Cube(NamedTuple):
    """A spectral image.

    Attributes:
        values: `[T, H, W]` float32, finite, 0 where `nodata`.
        wavelengths: `[T]` float32 in nm, or None if the file does not tell.
        nodata: `[T, H, W]` bool, True where the file declares that nothing was measured.
        notes: phrases that say what was left out, scaled or dropped, as in "band 2 is marked as bad (bbl)".
    """

    values: Tensor
    wavelengths: Tensor | None
    nodata: Tensor
    notes: tuple[str, ...] = ()


class Layout(NamedTuple):
    """Sizes and wavelengths of the image in a file.

    Attributes:
        shape: (T, H, W).
        wavelengths: `[T]` float32 in nm, or None if the file does not tell.
        notes: as in `Cube`.
    """

    shape: tuple[int, int, int]
    wavelengths: Tensor | None
    notes: tuple[str, ...] = ()


def read_cube(
    path: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    axes: str | None = None,
    nodata: float | None = None,
    scale: float | None = None,
    wavelengths: Sequence[float] | None = None,
    check_finite: bool = True,
    window: Window | None = None,
    classes: bool = False,
) -> Cube:
    """Read a TIFF, ENVI, PNG, JPEG, .npy, .npz, .mat (v4 to v7.3) or HDF5 file; the suffix tells the format.

    Args:
        path: the file; for ENVI the data file or its header.
        dataset: the name of the array in a file of several; not needed if only one is 3-D. Of a TIFF file the number of
            a page, from 0, to read it alone.
        axes: the order of the axes of a 3-D array, "THW", "HWT" or another permutation. None: as names, wavelengths or
            sizes of the axes tell. For TIFF files of several pages, what pages, rows and columns are. 2-D arrays are
            one band, "HW" or "WH".
        nodata: a value, as the file stores it, that means nodata, besides those that the file declares.
        scale: factor of the values, instead of the scale and offset that the file declares.
        wavelengths: of the file's bands in nm, instead of those that it tells.
        check_finite: False treats undeclared NaN and infinite values as nodata instead of raising an error.
        window: the pixels to read; None for all. Compressed arrays (.npz, .mat before v7.3) are read completely and
            cropped; of other files only the window is read.
        classes: whether the values are numbers of classes: those of a palette in a PNG file are read instead of its
            colours, and JPEG, which changes values, is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of an unknown kind, unreadable, truncated, empty, not real-valued, ambiguous, or has
            NaN, infinite or too large values that it does not declare as nodata, or the window is not within it. The
            message names the path.

    Example:
        >>> import numpy as np
        >>> from mmmae.data import read_cube
        >>> values = np.arange(24.0).reshape(2, 4, 3)  # rows, columns, bands
        >>> np.savez("cube.npz", cube=values, wavelengths=[450, 550, 650], nodata=0)
        >>> cube = read_cube("cube.npz", axes="HWT")
        >>> cube.values.shape, cube.wavelengths
        (torch.Size([3, 2, 4]), tensor([450., 550., 650.]))
        >>> cube.nodata.sum()  # the first value is 0
        tensor(1)
    """
    path = Path(path)
    with _errors_with_path(path, dataset, axes) as suffix:
        given = _checked_wavelengths(wavelengths)
        if suffix in CONTAINER_SUFFIXES:
            arrays = read_container(path, dataset, axes, window, given)
        elif suffix in TIFF_SUFFIXES:
            arrays = read_tiff(path, dataset, axes, window, given)
        elif suffix in PICTURE_SUFFIXES:
            arrays = read_picture(path, window, classes=classes)
        else:
            arrays = read_envi(path, window, given)
        if 0 in arrays.values.shape:
            raise ValueError(f"the array has shape {list(arrays.values.shape)}, expected at least one value")
        if nodata is not None:
            dtype = arrays.values.dtype
            if dtype.kind != "f" and math.isfinite(nodata) and not can_hold(dtype, nodata):
                raise _UnusableError(f"nodata= (--nodata) is {nodata:.17g}, which values of type {dtype} cannot be")
            equal = equal_to(arrays.values, nodata)
            arrays = arrays._replace(nodata=equal if arrays.nodata is None else arrays.nodata | equal)
        if scale is not None:
            if not math.isfinite(scale) or scale == 0:
                raise ValueError(f"scale is {scale:g}, expected a number other than 0")
            arrays = arrays._replace(scale=scale, offset=0.0)
        return _to_cube(arrays, _fitting(given, arrays.wavelengths, len(arrays.values)), check_finite)


def read_layout(
    path: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    axes: str | None = None,
    nodata: float | None = None,
    scale: float | None = None,
    wavelengths: Sequence[float] | None = None,
) -> Layout:
    """Read sizes and wavelengths without the values; arguments and errors are those of `read_cube`."""
    path = Path(path)
    with _errors_with_path(path, dataset, axes) as suffix:
        given = _checked_wavelengths(wavelengths)
        if suffix in CONTAINER_SUFFIXES:
            layout = container_layout(path, dataset, axes, given)
        elif suffix in TIFF_SUFFIXES:
            layout = tiff_layout(path, dataset, axes, given)
        elif suffix in PICTURE_SUFFIXES:
            layout = picture_layout(path)
        else:
            layout = envi_layout(path, given)
        return Layout(layout.shape, _fitting(given, layout.wavelengths, layout.shape[0]), layout.notes)


class _UnusableError(ValueError):
    """Says why values cannot be used although the file can be read."""


def _checked_wavelengths(wavelengths: Sequence[float] | None) -> npt.NDArray[np.float32] | None:
    if wavelengths is None:
        return None
    given = np.array(wavelengths, dtype=np.float32)
    if not (np.isfinite(given) & (given > 0)).all():
        raise ValueError("wavelengths has a value that is not a positive number of nm")
    return given


def _fitting(given: npt.NDArray[np.float32] | None, found: npt.NDArray[np.float32] | None, bands: int) -> Tensor | None:
    """Return the wavelengths given, or those found in the file."""
    if given is not None and len(given) != bands:
        raise ValueError(f"{len(given)} wavelengths are given, the file has {bands} bands")
    chosen = found if given is None else given
    return None if chosen is None else torch.from_numpy(chosen)


@contextmanager
def _errors_with_path(path: Path, dataset: str | None, axes: str | None) -> Iterator[str]:
    """Refuse a path that cannot be an image, and name it in errors of the block; yield its suffix."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if suffix not in SUFFIXES:
        if (way_out := conversion(path)) is not None:
            raise ValueError(f"{path}: {way_out}")
        raise ValueError(f"{path}: unknown suffix {suffix!r}, expected one of {' '.join(SUFFIXES)}")
    if suffix not in (*CONTAINER_SUFFIXES, *TIFF_SUFFIXES) and (dataset is not None or axes not in (None, "THW")):
        raise ValueError(
            f"{path}: dataset= and axes= (--dataset, --axes) are for .npy, .npz, .mat, HDF5 and TIFF files, "
            f"not for {_kind(suffix)}"
        )
    try:
        yield suffix
    except ImportError:
        raise
    except _UnusableError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file makes the format libraries raise nearly anything
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        cause = error.__cause__ if type(error).__module__.startswith("rasterio") else None  # GDAL's own words
        detail = str(cause or error) or "no reason given"
        kind_of_file = _kind(suffix)
        article = "an" if kind_of_file in ("ENVI", "HDF5") else "a"
        raise ValueError(f"{path}: cannot be read as {article} {kind_of_file} file: {kind}{detail}") from error


def _to_cube(arrays: Arrays, wavelengths: Tensor | None, check_finite: bool) -> Cube:
    values = arrays.values
    scale, offset = (np.asarray(factor, np.float64).reshape(-1, 1, 1) for factor in (arrays.scale, arrays.offset))
    with np.errstate(over="ignore", invalid="ignore"):
        if (scale != 1).any():
            values = values * scale
        if (offset != 0).any():
            values = values + offset
    hidden = np.zeros(values.shape, dtype=bool) if arrays.nodata is None else arrays.nodata
    if values.dtype.kind == "f":
        broken = ~np.isfinite(values)
        if broken.any():
            if check_finite:
                _refuse(broken & ~hidden, "NaN or infinite values", UNDECLARED)
            hidden = hidden | broken
    with np.errstate(over="ignore", invalid="ignore"):
        converted = np.ascontiguousarray(values, dtype=np.float32)
    if converted is arrays.values or not converted.flags.writeable:
        converted = converted.copy()
    converted[hidden] = 0
    _refuse(np.isinf(converted), "values too large for float32", "")
    hidden = np.require(hidden, requirements=["C", "W"])
    return Cube(torch.from_numpy(converted), wavelengths, torch.from_numpy(hidden), arrays.notes)


def _refuse(broken: npt.NDArray[np.bool_], what: str, why: str) -> None:
    counts = broken.sum(axis=(1, 2))
    if counts.any():
        places = ", ".join(f"{counts[band]} in band {band}" for band in np.flatnonzero(counts)[:8])
        rest = "" if (more := np.count_nonzero(counts) - 8) <= 0 else f" and {more} more bands"
        raise _UnusableError(f"{what}: {places}{rest}{why}")


def _kind(suffix: str) -> str:
    if suffix in TIFF_SUFFIXES:
        return "TIFF"
    if suffix in PICTURE_SUFFIXES:
        return "PNG" if suffix == ".png" else "JPEG"
    if suffix in CONTAINER_SUFFIXES:
        return "HDF5" if suffix in (".h5", ".hdf5", ".he5") else suffix
    return "ENVI"

"""Read TIFF files, and what GDAL opens besides, as arrays `[T, H, W]` with wavelengths, declared nodata and scale."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arrays import Arrays, ArraysLayout, equal_to
from .products import with_metadata, with_metadata_layout
from .tiff_pages import Page, chosen_pages, tiff_pages
from .wavelength_files import header_note
from .wavelengths import parse_wavelength, to_nanometres
from .windows import Window

TIFF_SUFFIXES = (".tif", ".tiff")

NO_WAVELENGTHS = np.zeros(0, dtype=np.float32)

Wavelengths = npt.NDArray[np.float32] | None


def read_tiff(
    path: Path,
    dataset: str | None = None,
    axes: str | None = None,
    window: Window | None = None,
    wavelengths: Wavelengths = None,
) -> Arrays:
    """Read every band of a TIFF file, or a window of it: the bands of its only page, or one band from each page.

    Pixels that equal the declared nodata value, that the file's mask hides or that are transparent are nodata.

    Args:
        path: an existing file.
        dataset: number of a page, from 0, to read it alone.
        axes: what pages, rows and columns of a stack of pages are; None means "THW".
        window: the pixels to read; None for all.
        wavelengths: of the bands in nm, instead of those that the file tells.

    Raises:
        ValueError: the file is damaged, or its pages are no stack of bands.
    """
    pages, names = _names(path, dataset, axes)
    order = _order(pages, axes)
    if order == "THW":
        image = with_metadata(path, _read_pages(path, names, pages, window, wavelengths))
        return image if image.wavelengths is not None else image._replace(notes=image.notes + header_note(path))
    stack = _read_pages(path, names, pages, None, NO_WAVELENGTHS)
    assert stack.nodata is not None
    turn, part = [order.index(axis) for axis in "THW"], (slice(None), slice(None), slice(None))
    if window is not None:
        window.check_within(*(stack.values.shape[order.index(axis)] for axis in "HW"))
        part = slice(None), *window.slices
    values, nodata = stack.values.transpose(turn)[part], stack.nodata.transpose(turn)[part]
    scale, offset = (_of_turned(numbers, order) for numbers in (stack.scale, stack.offset))
    return Arrays(values, wavelengths, nodata, scale, offset, stack.notes)


def tiff_layout(
    path: Path, dataset: str | None = None, axes: str | None = None, wavelengths: Wavelengths = None
) -> ArraysLayout:
    """Read the sizes (T, H, W) and the wavelengths of what `read_tiff` would read, but no values."""
    pages, names = _names(path, dataset, axes)
    order = _order(pages, axes)
    if order == "THW":
        if _is_plain(pages):
            wavelengths, notes = _told_by_pages(pages, wavelengths)
            layout = ArraysLayout((len(pages), pages[0].height, pages[0].width), wavelengths, notes)
        else:
            layout = bands_layout(names, "GTiff", wavelengths, pages)
        layout = with_metadata_layout(path, layout)
        return layout if layout.wavelengths is not None else layout._replace(notes=layout.notes + header_note(path))
    sizes = dict(zip(order, (len(pages), pages[0].height, pages[0].width), strict=True))
    return ArraysLayout((sizes["T"], sizes["H"], sizes["W"]), wavelengths)


def _read_pages(
    path: Path, names: Sequence[str], pages: Sequence[Page], window: Window | None, given: Wavelengths
) -> Arrays:
    """Read pages by GDAL, or straight from the file if they are many and plain: GDAL takes 3 ms to open one."""
    if not _is_plain(pages):
        return read_bands(names, "GTiff", window, given, pages)
    wavelengths, notes = _told_by_pages(pages, given)
    height, width = pages[0].height, pages[0].width
    window = window or Window(0, 0, height, width)
    window.check_within(height, width)
    content = np.memmap(path, np.uint8, "r")
    values = np.empty((len(pages), window.height, window.width), np.dtype(pages[0].dtype))
    for number, page in enumerate(pages):
        assert page.plain is not None
        values[number] = np.ndarray((height, width), page.plain[0], content, page.plain[1])[window.slices]
    return Arrays(values, wavelengths, np.zeros(values.shape, dtype=bool), notes=notes)


def _is_plain(pages: Sequence[Page]) -> bool:
    return len(pages) > 1 and all(page.plain is not None for page in pages)


def _told_by_pages(pages: Sequence[Page], given: Wavelengths) -> tuple[Wavelengths, tuple[str, ...]]:
    """Return wavelengths and notes of pages that are read without GDAL."""
    notes = _turned(pages[0])
    bands = [_Band(next(filter(None, map(parse_wavelength, page.texts)), None), 1.0, 0.0) for page in pages]
    return _wavelengths(bands, notes) if given is None else given, tuple(notes)


def _turned(page: Page) -> list[str]:
    if page.orientation in (0, 1):
        return []
    return [f"the file's orientation, {page.orientation}, is not applied"]


def _names(path: Path, dataset: str | None, axes: str | None) -> tuple[list[Page], list[str]]:
    """Return the pages to read of a TIFF file, and the names by which GDAL opens them."""
    known = tiff_pages(path)
    pages = chosen_pages(known, dataset, axes)
    absolute = os.path.abspath(path)  # because rasterio takes "s3:x.tif" for a URL
    if len(known) == 1:
        return pages, [absolute]
    return pages, [f"GTIFF_DIR:off:{page.offset}:{absolute}" for page in pages]


def _order(pages: Sequence[Page], axes: str | None) -> str:
    if axes in (None, "THW"):
        return "THW"
    if sorted(axes) != ["H", "T", "W"]:
        raise ValueError(f'axes is {axes!r}, expected the letters T, H and W in the order of the file, as in "HWT"')
    if len(pages) == 1:
        raise ValueError("axes= (--axes) is for TIFF files of several pages: this one has one page")
    return axes


def _of_turned(numbers: float | npt.NDArray[np.float64], order: str) -> float | npt.NDArray[np.float64]:
    """Return the scale or offset of bands by those of pages; raise ValueError if pages are no bands and differ."""
    each = np.atleast_1d(numbers)
    if order[0] == "T":
        return numbers
    if (each != each[0]).any():
        raise ValueError(
            f"pages have several scales or offsets, which are of no band where axes are {order}; save the file with a "
            "page a band"
        )
    return float(each[0])


@contextmanager
def open_raster(name: str, driver: str) -> Iterator[Any]:
    """Open a raster with a driver of GDAL, which the file can't choose itself; raise ValueError if it is complex."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(name, driver=driver) as source:
            if any(dtype.startswith("complex") for dtype in source.dtypes):
                raise ValueError(f"the values are {source.dtypes[0]}, expected real numbers")
            yield source


class _Band(NamedTuple):
    """What a file tells of one band."""

    wavelength: tuple[float, str] | None
    scale: float
    offset: float


def read_bands(
    names: Sequence[str], driver: str, window: Window | None, given: Wavelengths, pages: Sequence[Page]
) -> Arrays:
    """Read all bands of the rasters `names` one after another, or a window of them, without alpha.

    Args:
        names: as GDAL opens them.
        driver: of GDAL.
        window: the pixels to read; None for all.
        given: wavelengths of the bands in nm, instead of those that the rasters tell.
        pages: those of the file that the rasters are, if it has several.
    """
    values: list[npt.NDArray[Any]] = []
    nodata: list[npt.NDArray[np.bool_]] = []
    bands: list[_Band] = []
    notes: list[str] = []
    first: float | None = None
    for number, name in enumerate(names):  # one at a time: a stack may have more pages than a process may open files
        with open_raster(name, driver) as source:
            bands += _describe(source, pages, number, notes)
            found, hidden = _values(source, window, first)
            first = source.nodatavals[0] if number == 0 else first
            values.append(found)
            nodata.append(hidden)
    wavelengths = _wavelengths(bands, notes) if given is None else given
    notes += _scaling_notes(bands)
    scale, offset = np.array([band.scale for band in bands]), np.array([band.offset for band in bands])
    notes = list(dict.fromkeys(notes))
    return Arrays(np.concatenate(values), wavelengths, np.concatenate(nodata), scale, offset, tuple(notes))


def bands_layout(names: Sequence[str], driver: str, given: Wavelengths, pages: Sequence[Page]) -> ArraysLayout:
    """Read the sizes and wavelengths of what `read_bands` would read, but no values."""
    bands: list[_Band] = []
    notes: list[str] = []
    size = 0, 0
    for number, name in enumerate(names):
        with open_raster(name, driver) as source:
            bands += _describe(source, pages, number, notes)
            size = source.height, source.width
    wavelengths = _wavelengths(bands, notes) if given is None else given
    notes += _scaling_notes(bands)
    return ArraysLayout((len(bands), *size), wavelengths, tuple(dict.fromkeys(notes)))


def _scaling_notes(bands: Sequence[_Band]) -> list[str]:
    """Return how the scales and offsets of a file change its values, in words."""
    scales, offsets = {band.scale for band in bands}, {band.offset for band in bands}
    found = []
    if scales - {1}:
        found.append(f"values are multiplied by {_one(scales)} (scale)")
    if offsets - {0}:
        found.append(f"{_one(offsets)} is added to values (offset)")
    return found


def _one(numbers: set[float]) -> str:
    return f"{min(numbers):g}" if len(numbers) == 1 else "one number a band"


def _describe(source: Any, pages: Sequence[Page], number: int, notes: list[str]) -> list[_Band]:
    """Return what one page tells of its bands that are kept, and add notes on it."""
    bands: list[_Band] = []
    kept, alpha = _kept(source), _alpha(source)
    if alpha is not None:
        notes.append(f"band {alpha} is tagged as alpha and is {'read as a band' if alpha in kept else 'left out'}")
    if pages:
        notes += _turned(pages[number])
    dataset_unit = {key.lower(): text for key, text in source.tags().items()}.get("wavelength_units", "")
    for band in kept:
        tags = {key.lower(): text for key, text in source.tags(band + 1).items()}
        number_given, imagery = tags.get("wavelength", ""), source.tags(band + 1, ns="IMAGERY")
        texts = [number_given, source.descriptions[band] or "", *(pages[number].texts if len(pages) > 1 else ())]
        wavelength = next(filter(None, map(parse_wavelength, texts)), None)
        if _is_number(number_given):
            wavelength = float(number_given), tags.get("wavelength_units", dataset_unit).strip().lower()
        elif wavelength is None and _is_number(micrometres := imagery.get("CENTRAL_WAVELENGTH_UM", "")):
            wavelength = float(micrometres), "um"  # rounded by GDAL to 1 nm, so last
        bands.append(_Band(wavelength, source.scales[band], source.offsets[band]))
    return bands


def _values(
    source: Any, window: Window | None, nodata_of_first: float | None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Read values and nodata of the bands that are kept; a page without a nodata value has that of the first page."""
    from rasterio.enums import MaskFlags
    from rasterio.windows import Window as RasterWindow

    place = None
    if window is not None:
        window.check_within(source.height, source.width)
        place = RasterWindow(window.column, window.row, window.width, window.height)
    kept, alpha, flags = _kept(source), _alpha(source), source.mask_flag_enums
    values = source.read([band + 1 for band in kept], window=place)
    nodata = np.zeros(values.shape, dtype=bool)
    for number, band in enumerate(kept):
        if MaskFlags.all_valid not in flags[band] and MaskFlags.alpha not in flags[band]:
            nodata[number] = source.read_masks(band + 1, window=place) == 0
        declared = source.nodatavals[band]
        declared = nodata_of_first if declared is None else declared
        if declared is not None:  # GDAL leaves it out of the mask where the file has a mask or alpha
            nodata[number] |= equal_to(values[number], declared)
    if alpha is not None and alpha not in kept:
        nodata |= source.read(alpha + 1, window=place) == 0
    return values, nodata


def _alpha(source: Any) -> int | None:
    """Return the number of the band that is tagged as alpha."""
    from rasterio.enums import ColorInterp

    meanings = source.colorinterp
    return meanings.index(ColorInterp.alpha) if ColorInterp.alpha in meanings else None


def _kept(source: Any) -> list[int]:
    """Return the bands without alpha. A fourth band of a TIFF file is kept: writers tag any as alpha."""
    any_fourth = source.driver == "GTiff" and source.count == 4
    left_out = None if any_fourth else _alpha(source)
    return [band for band in range(source.count) if band != left_out]


def _wavelengths(bands: Sequence[_Band], notes: list[str]) -> Wavelengths:
    """Return wavelengths in nm; those of one unit are converted together, as a missing unit is guessed from them."""
    known = [band.wavelength for band in bands if band.wavelength is not None]
    if len(known) < len(bands):
        if known:
            notes.append(f"only {len(known)} of {len(bands)} bands tell their wavelength, so none is used")
        return None
    values, units = np.array([value for value, _ in known]), np.array([unit for _, unit in known])
    converted = np.zeros(len(known), dtype=np.float32)
    for unit in sorted(set(units.tolist())):
        nm = to_nanometres(values[units == unit], unit)
        if nm is None:
            notes.append(f"the wavelengths have the unit {unit!r} or are not positive, and are not used")
            return None
        converted[units == unit] = nm
    return converted


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

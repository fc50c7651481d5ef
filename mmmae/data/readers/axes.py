"""Which axis of an array is which: by its names, its wavelengths, its sizes, or the format's convention."""

import re
from collections.abc import Sequence

# The first of these words in the name of an axis tells which one it is.
_AXES = {
    "T": ("band", "bands", "wavelength", "wavelengths", "channel", "channels", "spectral", "wl", "lambda"),
    "H": ("y", "lat", "latitude", "northing", "row", "rows", "line", "lines", "height", "downtrack", "scan", "scans"),
    "W": (
        "x", "lon", "longitude", "easting", "column", "columns", "col", "cols", "pixel", "pixels", "sample", "samples",
        "width", "crosstrack",
    ),
}  # fmt: skip
_AXIS = {word: axis for axis, words in _AXES.items() for word in words}
CLEARLY = 3  # so many times smaller than the others is a size that must be that of the bands
SMALLEST_IMAGE = 16

HINT = 'say the order of its axes by axes= (--axes), as in "HWT"'


def checked_axes(axes: str, ndim: int) -> str:
    """Return `axes` for an array of `ndim` axes; raise ValueError if they are not the letters for it."""
    if sorted(axes) == ["H", "T", "W"]:
        return axes if ndim == 3 else axes.replace("T", "")
    if ndim == 2 and sorted(axes) == ["H", "W"]:
        return axes
    raise ValueError(f'axes is {axes!r}, expected the letters T, H and W in the order of the file, as in "HWT"')


def axes_by_name(dimensions: Sequence[str]) -> str | None:
    """Return the axes that three names tell, as "HWT" for ("lat", "lon", "band"), or None if they do not tell all."""
    found = ""
    for name in dimensions:
        words = re.findall(r"[^\W_]+", name.lower())
        found += next((_AXIS[word] for word in words if word in _AXIS), "?")
    return found if sorted(found) == ["H", "T", "W"] else None


def axes_by_wavelengths(sizes: Sequence[int], count: int, *, matlab: bool) -> str:
    """Return the axes of an array that has `count` wavelengths, the number of an axis.

    Raises:
        ValueError: several axes have this size, and the last is not MATLAB's.
    """
    fitting = [axis for axis, size in enumerate(sizes) if size == count]
    if len(fitting) == 1 or (matlab and 2 in fitting):
        return _with_bands_at(2 if matlab and 2 in fitting else fitting[0])
    raise ValueError(f"the array {list(sizes)} has {len(fitting)} axes of the size of its {count} wavelengths; {HINT}")


def axes_by_size(sizes: Sequence[int], *, matlab: bool) -> str:
    """Return the axes of an array that has neither names nor wavelengths.

    Two axes of one size are those of a square image if they are the last two, or if one of the next two rules says the
    same; a size that is clearly smaller than both others is that of the bands; else the image is what has at least 16
    rows and columns. Arrays smaller than that are bands x rows x columns.
    MATLAB's are rows x columns x bands, unless the sizes contradict.

    Raises:
        ValueError: the sizes do not tell, or contradict MATLAB's order.
    """
    others = [sorted((*sizes[:axis], *sizes[axis + 1 :])) for axis in range(3)]
    square = [axis for axis in range(3) if others[axis][0] == others[axis][1]]
    clear = [axis for axis in range(3) if CLEARLY * sizes[axis] <= others[axis][0]]
    images = [axis for axis in range(3) if others[axis][0] >= SMALLEST_IMAGE]
    bands = next((found[0] for found in (square, clear, images) if len(found) == 1), None)
    # The first two axes may be of one size by chance, and rows x bands x columns are rare.
    doubtful = len(square) == 3 or (square not in ([], [0]) and square not in (clear, images))
    if matlab and (doubtful or bands in (None, 2)):
        return "HWT"
    if not doubtful and not matlab:
        if bands is not None:
            return _with_bands_at(bands)
        if not images:
            return "THW"
    raise ValueError(f"the sizes {list(sizes)} do not tell which axis is that of the bands; {HINT}")


def _with_bands_at(axis: int) -> str:
    return "HW"[:axis] + "T" + "HW"[axis:]

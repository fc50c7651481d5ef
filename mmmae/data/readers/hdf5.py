"""The arrays of an HDF5 file, which netCDF-4, HDF-EOS5 and MATLAB v7.3 files are too."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .declared import is_unsigned
from .stored import Attributes, Part, StoredArray, StoredArrays, text

DEEPEST = 64
DIMENSION_ONLY = "This is a netCDF dimension but not a netCDF variable"


def hdf5_arrays(file: Any, *, matlab: bool) -> StoredArrays:
    """Return the arrays of an open h5py file; links to other files are not followed.

    Args:
        file: the h5py.File.
        matlab: whether it is MATLAB's, which stores axes in reverse.
    """
    import h5py

    arrays: StoredArrays = {}
    netcdf = "_NCProperties" in file.attrs

    def visit(name: str, item: Any) -> None:
        if name.count("/") > DEEPEST:  # looking at a thing takes time by its depth: thousands of groups took minutes
            raise ValueError(f"its groups lie in each other more than {DEEPEST} deep")
        if not isinstance(item, h5py.Dataset) or name.startswith("#refs#") or item.shape is None:
            return
        if not text(item.attrs.get("NAME", "")).startswith(DIMENSION_ONLY):
            arrays[name] = _array(name, item, matlab, netcdf)

    file.visititems(visit)
    return arrays


def _array(name: str, item: Any, matlab: bool, netcdf: bool) -> StoredArray:
    kind = text(item.attrs.get("MATLAB_class", b"")) if matlab else ""
    numeric = item.dtype.kind in "biuf" and kind not in ("char", "cell") and "MATLAB_empty" not in item.attrs

    def attributes() -> tuple[Attributes, ...]:
        groups = [item.parent]
        while groups[-1].name != "/":
            groups.append(groups[-1].parent)
        return tuple(dict(place.attrs.items()) for place in (item, *groups))

    def read(part: Part) -> npt.NDArray[Any]:
        return np.asarray(item[part])

    def unwritten(part: Part) -> npt.NDArray[np.bool_] | None:
        return _unwritten(item, part)

    return StoredArray(
        tuple(reversed(item.shape)) if matlab else item.shape,
        numeric,
        item.dtype,
        _reversed(read) if matlab else read,
        attributes,
        () if matlab or item.ndim < 3 else tuple(_dimension(axis) for axis in item.dims),
        _fill(item, netcdf) if numeric else None,
        _reversed(unwritten) if matlab else unwritten,
        _refusal(name, item),
    )


def _reversed(read: Callable[[Part], Any]) -> Callable[[Part], Any]:
    """Return a function that reads as `read` does, with the axes in reverse."""

    def reverse(part: Part) -> Any:
        found = read(part if part is ... else tuple(reversed(part)))
        return None if found is None else found.T

    return reverse


def _refusal(name: str, item: Any) -> str | None:
    if item.is_virtual:
        return f"array {name!r} is virtual: its values are in other files; copy them into this one"
    if item.external:
        others = ", ".join(repr(part[0]) for part in item.external[:3])
        return f"the values of array {name!r} are in other files ({others}); copy them into this one"
    if item.size and item.id.get_storage_size() == 0:
        return f"array {name!r} was created but never written"
    return None


def _fill(item: Any, netcdf: bool) -> float | None:
    """Return the fill value if the writer chose one: 0 is HDF5's default, and netCDF's 255 may be any byte's value."""
    import h5py

    unsigned = item.dtype == np.int8 and is_unsigned(item.attrs)
    defined = item.id.get_create_plist().fill_value_defined()
    if defined != h5py.h5d.FILL_VALUE_USER_DEFINED or (netcdf and (item.dtype == np.uint8 or unsigned)):
        return None
    value = item.fillvalue.item()
    return value if value != 0 else None


def _unwritten(item: Any, part: Part) -> npt.NDArray[np.bool_] | None:
    """Return where a part of a chunked dataset was never written, or None if all of it was."""
    if item.chunks is None:
        return None
    counts = [-(-size // chunk) for size, chunk in zip(item.shape, item.chunks, strict=True)]
    if item.id.get_num_chunks() >= np.prod(counts, dtype=object):
        return None
    written = np.zeros(counts, dtype=bool)

    def mark(stored: Any) -> None:
        written[tuple(offset // chunk for offset, chunk in zip(stored.chunk_offset, item.chunks, strict=True))] = True

    item.id.chunk_iter(mark)
    places = (slice(None),) * item.ndim if part is ... else part
    axes = zip(item.shape, places, item.chunks, strict=True)
    return np.asarray(~written[np.ix_(*(np.arange(size)[place] // chunk for size, place, chunk in axes))])


def _dimension(axis: Any) -> str:
    """Return the name of an axis: its label, else that of the dimension scale attached to it."""
    if axis.label or not len(axis):
        return str(axis.label)
    return str(axis[0].name).rsplit("/", 1)[-1]

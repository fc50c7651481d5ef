"""Read cubes from .npy, .npz, .mat, HDF5 and netCDF files: find the arrays, and order their axes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arrays import Arrays, ArraysLayout
from .axes import HINT, axes_by_name, axes_by_size, axes_by_wavelengths, checked_axes
from .declared import Scaling, declared_nodata, declared_range, declared_scaling, is_nodata, is_unsigned, numbers_in
from .formats import CONTAINER_SUFFIXES, open_arrays
from .matrices import Matrix, find_matrix
from .products import Piece, find_product, matching
from .stored import Part, StoredArray, StoredArrays, listing, squeezed
from .wavelengths import find_wavelengths, to_nanometres, unread_wavelengths, wavelength_vectors
from .windows import Window

__all__ = ["CONTAINER_SUFFIXES", "container_layout", "read_container"]

Nanometres = npt.NDArray[np.float32]


class _Piece(NamedTuple):
    """An array of the file that is a cube, or some bands of it.

    Attributes:
        array: where its values are.
        axes: "THW" in the order of the file, two letters for one band.
        shape: (T, H, W), with the bands that are not kept.
        matrix: how it holds pixels if it is a matrix of bands x pixels.
        wavelengths: `[T]` in nm, or None.
        kept: numbers of the bands that it has.
        bad: numbers of those of them without data.
        nodata: stored values that mean nothing.
        valid: the least and the largest stored value; what is beyond means nothing.
        unsigned: whether integers are meant without sign.
        scaling: how stored values become measured ones.
    """

    array: StoredArray
    axes: str
    shape: tuple[int, int, int]
    matrix: Matrix | None
    wavelengths: Nanometres | None
    kept: list[int]
    bad: list[int]
    nodata: list[float]
    valid: tuple[float, float]
    unsigned: bool
    scaling: Scaling


class _Plan(NamedTuple):
    """What is read from a file: pieces with bands in the order `order`, and their wavelengths."""

    pieces: list[_Piece]
    order: npt.NDArray[np.intp]
    wavelengths: Nanometres | None
    notes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.order), *self.pieces[0].shape[1:]


def read_container(
    path: Path,
    dataset: str | None,
    axes: str | None,
    window: Window | None = None,
    wavelengths: Nanometres | None = None,
) -> Arrays:
    """Read the cube of a file as it is stored, with what the file says about it.

    Args:
        path: an existing file with one of `CONTAINER_SUFFIXES`.
        dataset: the array's name; None takes those of a known product, or the only 3-D numeric array, or, if there is
            none, the only 2-D one.
        axes: the order of the three axes in the file, "THW" or any permutation. None: by the names of its axes, the
            number of its wavelengths, or its sizes; .mat files, also those of v7.3, which store it reversed, are "HWT".
            A 2-D array is one band, "HW" or "WH".
        window: the rows and columns to read; None for all. Of .npy and HDF5 files nothing else is read.
        wavelengths: those of the bands in nm, instead of what the file tells; None: as the file tells.
    """
    with _plan(path, dataset, axes, wavelengths) as plan:
        if window is not None:
            window.check_within(*plan.shape[1:])
        read = [_read(piece, window) for piece in plan.pieces]
        values = _joined([values for values, _ in read], plan.order)
        nodata = None
        if any(hidden is not None for _, hidden in read):
            masks = [np.zeros(values.shape, bool) if hidden is None else hidden for values, hidden in read]
            nodata = _joined(masks, plan.order)
        scale, offset = (_by_band(plan, field) for field in ("scale", "offset"))
        return Arrays(values, plan.wavelengths, nodata, scale, offset, plan.notes)


def container_layout(
    path: Path, dataset: str | None, axes: str | None, wavelengths: Nanometres | None = None
) -> ArraysLayout:
    """Read the sizes (T, H, W) and the wavelengths of the cube that `read_container` would read."""
    with _plan(path, dataset, axes, wavelengths) as plan:
        return ArraysLayout(plan.shape, plan.wavelengths, plan.notes)


@contextmanager
def _plan(path: Path, dataset: str | None, axes: str | None, given: Nanometres | None) -> Iterator[_Plan]:
    matlab = path.suffix.lower() == ".mat"
    with open_arrays(path) as found:
        arrays = {name: squeezed(array) for name, array in found.items()}
        notes: list[str] = []
        product, pieces = find_product(arrays)
        if dataset is not None:
            pieces = [(name, piece) for name, piece in pieces if name == dataset.strip("/")]
        if pieces:
            notes.append(f"read as {product}")
            planned = [_product_piece(arrays, name, piece, axes, given, notes) for name, piece in pieces]
        else:
            name = _chosen_name(arrays, dataset)
            planned = [_any_piece(arrays, name, axes, given, notes, matlab=matlab)]
        sizes = {piece.shape[1:] for piece in planned}
        if len(sizes) > 1:
            raise ValueError(f"the arrays of the cube are of several sizes, {sizes}; name one by dataset= (--dataset)")
        yield _ordered(planned, given, notes)


def _ordered(pieces: list[_Piece], given: Nanometres | None, notes: list[str]) -> _Plan:
    """Return the plan for pieces, whose bands are ordered by wavelength if there are several."""
    counts = [len(piece.kept) for piece in pieces]
    order = np.arange(sum(counts))
    wavelengths = given
    if given is None:
        known = [piece.wavelengths[piece.kept] for piece in pieces if piece.wavelengths is not None]
        wavelengths = np.concatenate(known) if len(known) == len(pieces) else None
        if wavelengths is not None and len(pieces) > 1:
            order = np.argsort(wavelengths, kind="stable")
            wavelengths = wavelengths[order]
    return _Plan(pieces, order, wavelengths, tuple(note for note in dict.fromkeys(notes) if note))


def _product_piece(
    arrays: StoredArrays, name: str, piece: Piece, axes: str | None, given: Nanometres | None, notes: list[str]
) -> _Piece:
    """Return an array of a known product as its layout says."""
    array = _readable(arrays, name)
    if len(array.shape) != 3:
        raise ValueError(f"array {name!r} has shape {list(array.shape)}, expected 3 dimensions")
    axes = checked_axes(axes or piece.axes, 3)
    shape = _shape(array, axes)
    root = array.attributes()[-1]
    kept, bad = list(range(shape[0])), []
    wavelengths = None
    if given is None:
        if piece.wavelengths is None:
            found = find_wavelengths(arrays, name, (shape[0],))
            wavelengths = None if found is None else found.nanometres()
        elif piece.wavelengths.startswith("@"):
            attribute = piece.wavelengths.removeprefix("@")
            centres = np.array(numbers_in(attribute, root.get(attribute, ())), np.float64)
            _check_count(centres.size, shape[0], attribute, array, axes)
            kept = [int(band) for band in np.flatnonzero(centres > 0)]
            if len(kept) < shape[0]:
                notes.append(f"{shape[0] - len(kept)} bands of {name.rsplit('/', 1)[-1]} have no wavelength, left out")
            wavelengths = np.where(centres > 0, centres, 1).astype(np.float32)
        else:
            source = matching(arrays, piece.wavelengths)[0]
            vector = next((vector for vector in wavelength_vectors(arrays, name) if vector.name == source), None)
            wavelengths = to_nanometres(_readable(arrays, source).read(...), vector.unit if vector else None)
            _check_count(int(np.prod(arrays[source].shape)), shape[0], source, array, axes)
    if piece.good is not None:
        for source in matching(arrays, piece.good):
            good = np.asarray(_readable(arrays, source).read(...)).reshape(-1)
            if good.size == shape[0]:
                bad = [int(band) for band in np.flatnonzero(good == 0)]
    if bad:
        notes.append(f"{len(bad)} bands are marked as bad ({piece.good})")
    own = array.attributes()[0]
    scaling = declared_scaling(array.attributes(), shape[0]) if piece.scaling is None else piece.scaling(root)
    nodata, remarks = declared_nodata(arrays, name)
    notes += [*remarks, scaling.note]
    valid = declared_range(own, array.dtype, notes)
    nodata = nodata if piece.nodata is None else [*nodata, piece.nodata]
    return _Piece(array, axes, shape, None, wavelengths, kept, bad, nodata, valid, is_unsigned(own), scaling)


def _any_piece(
    arrays: StoredArrays, name: str, axes: str | None, given: Nanometres | None, notes: list[str], *, matlab: bool
) -> _Piece:
    """Return an array of an unknown layout by the general rules."""
    array = _readable(arrays, name)
    ndim = len(array.shape)
    if ndim not in (2, 3):
        raise ValueError(f"array {name!r} has shape {list(array.shape)}, expected 2 or 3 dimensions")
    matrix = None
    if axes is not None:
        axes = checked_axes(axes, ndim)
    elif ndim == 3:
        axes, how = _found_axes(arrays, name, given, matlab=matlab)
        if axes != ("HWT" if matlab else "THW"):
            notes.append(f"axes are {axes} by {how}")
    else:
        axes, matrix = "HW", _found_matrix(arrays, name, given, matlab=matlab)
    shape = _shape(array, axes)
    if matrix is not None:
        shape = (array.shape[0 if matrix.bands_first else 1], matrix.height, matrix.width)
        notes.append(f"a matrix of {shape[0]} bands x {shape[1]} x {shape[2]} pixels, column by column")
    wavelengths = None if given is not None else _found_wavelengths(arrays, name, shape[0], axes, notes)
    own = array.attributes()[0]
    scaling = declared_scaling(array.attributes(), shape[0])
    nodata, remarks = declared_nodata(arrays, name)
    notes += [*remarks, scaling.note]
    valid = declared_range(own, array.dtype, notes)
    kept = list(range(shape[0]))
    return _Piece(array, axes, shape, matrix, wavelengths, kept, [], nodata, valid, is_unsigned(own), scaling)


def _found_axes(arrays: StoredArrays, name: str, given: Nanometres | None, *, matlab: bool) -> tuple[str, str]:
    """Return the order of three axes, and what tells it."""
    array = arrays[name]
    named = axes_by_name(array.dimensions)
    if named is not None:
        return named, "their names"
    if given is not None:
        count = len(given) if len(given) in array.shape else None
    else:
        vector = find_wavelengths(arrays, name, set(array.shape))
        count = None if vector is None else len(vector.values)
    if count is not None:
        return axes_by_wavelengths(array.shape, count, matlab=matlab), "the number of wavelengths"
    return axes_by_size(array.shape, matlab=matlab), "the sizes"


def _found_matrix(arrays: StoredArrays, name: str, given: Nanometres | None, *, matlab: bool) -> Matrix | None:
    """Return how a 2-D array holds pixels, or None for an image of one band; raise ValueError in doubt."""
    sizes = arrays[name].shape
    matrix = find_matrix(arrays, name)
    if matrix is not None and matlab:
        return matrix
    lengths = {size for size in sizes if size > 1}
    vector = find_wavelengths(arrays, name, lengths) if given is None else None
    if matrix is not None or vector is not None or (given is not None and len(given) in lengths):
        raise ValueError(
            f"array {name!r} {list(sizes)} could be a matrix of bands x pixels, whose order the file does not tell; "
            'store it with three axes, or say by axes="HW" (--axes HW) that it is an image of one band'
        )
    return None


def _found_wavelengths(arrays: StoredArrays, name: str, bands: int, axes: str, notes: list[str]) -> Nanometres | None:
    """Return the wavelengths of an array; raise ValueError if those that must be its own are not as many."""
    vector = find_wavelengths(arrays, name, (bands,))
    if vector is not None:
        found = vector.nanometres()
        if found is None:
            notes.append(f"{vector.name} is not used, its unit is {vector.unit or 'unknown'}")
        return found
    if bands > 1:
        others = {
            size
            for other, array in arrays.items()
            if other != name
            for size in array.shape[:3]
            if len(array.shape) == 3
        }
        for vector in wavelength_vectors(arrays, name):
            if len(vector.values) not in others:
                _check_count(len(vector.values), bands, vector.name, arrays[name], axes)
        notes += unread_wavelengths(arrays, name)
    return None


def _check_count(count: int, bands: int, source: str, array: StoredArray, axes: str) -> None:
    if count == bands:
        return
    if len(array.shape) == 3 and count in array.shape:
        raise ValueError(
            f"{source!r} has {count} entries but the array {list(array.shape)} read as {axes} has {bands} bands; {HINT}"
        )
    raise ValueError(f"{source!r} has {count} entries, but the array has {bands} bands")


def _readable(arrays: StoredArrays, name: str) -> StoredArray:
    array = arrays[name]
    if array.refusal is not None:
        raise ValueError(array.refusal)
    return array


def _shape(array: StoredArray, axes: str) -> tuple[int, int, int]:
    sizes = dict(zip(axes, array.shape, strict=True))
    return sizes.get("T", 1), sizes["H"], sizes["W"]


def _chosen_name(arrays: StoredArrays, dataset: str | None) -> str:
    if dataset is not None:
        wanted = dataset.strip("/")
        if wanted not in arrays:
            raise ValueError(f"no array {dataset!r}; the file has {listing(arrays)}")
        return wanted
    if len(arrays) == 1:
        return next(iter(arrays))
    for ndim in (3, 2):
        candidates = {
            name: array
            for name, array in arrays.items()
            if array.numeric and len(array.shape) == ndim and not (ndim == 2 and min(array.shape) == 1)
        }
        if len(candidates) == 1:
            return next(iter(candidates))
        if candidates:
            raise ValueError(f"several {ndim}-D arrays, name one by --dataset or dataset=: {listing(candidates)}")
    raise ValueError(f"expected a 3-D array of numbers, the file has {listing(arrays)}")


def _read(piece: _Piece, window: Window | None) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Read the kept bands of a piece as `[T, H, W]`, and where they are nodata, or None."""
    part: Part = ...
    if window is not None and piece.matrix is None:
        slices = dict(zip("HW", window.slices, strict=True))
        part = tuple(slices.get(axis, slice(None)) for axis in piece.axes)
    values = _as_thw(piece, piece.array.read(part), window)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"the array has type {values.dtype}, expected real numbers")
    if piece.unsigned and values.dtype.kind == "i":
        values = values.astype(values.dtype.newbyteorder("=")).view(f"u{values.dtype.itemsize}")
    hidden = is_nodata(values, piece.nodata)
    if piece.valid != (-math.inf, math.inf):
        beyond = (values < piece.valid[0]) | (values > piece.valid[1])
        hidden = beyond if hidden is None else hidden | beyond
    unwritten = piece.array.unwritten(part)
    if unwritten is not None:
        unwritten = _as_thw(piece, unwritten, window)
        hidden = unwritten if hidden is None else hidden | unwritten
    if piece.bad:
        hidden = np.zeros(values.shape, bool) if hidden is None else hidden.copy()
        hidden[piece.bad] = True
    if len(piece.kept) < len(values):
        values, hidden = values[piece.kept], None if hidden is None else hidden[piece.kept]
    return values, hidden


def _as_thw(piece: _Piece, values: npt.NDArray[Any], window: Window | None) -> npt.NDArray[Any]:
    if piece.matrix is not None:
        matrix = values if piece.matrix.bands_first else values.T
        cube = matrix.reshape(len(matrix), piece.matrix.width, piece.matrix.height).transpose(0, 2, 1)
        return cube if window is None else cube[(slice(None), *window.slices)]
    if len(piece.axes) == 2:
        return values[None] if piece.axes == "HW" else values.T[None]
    return values.transpose([piece.axes.index(axis) for axis in "THW"])


def _joined(parts: list[npt.NDArray[Any]], order: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)[order]


def _by_band(plan: _Plan, field: str) -> float | npt.NDArray[np.float64]:
    """Return scale or offset as one number if all bands have it, else one for each band."""
    each = [
        np.broadcast_to(np.asarray(getattr(piece.scaling, field), np.float64), (piece.shape[0],))[piece.kept]
        for piece in plan.pieces
    ]
    numbers = np.concatenate(each)[plan.order]
    return float(numbers[0]) if numbers.size and (numbers == numbers[0]).all() else numbers

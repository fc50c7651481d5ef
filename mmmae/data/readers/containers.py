"""Read cubes from .npy, .npz, .mat and HDF5 files: find the array, and order its axes."""

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from .arrays import Arrays, ArraysLayout
from .wavelengths import to_nanometres
from .windows import Window

CONTAINER_SUFFIXES = (".npy", ".npz", ".mat", ".h5", ".hdf5", ".he5")

Part: TypeAlias = EllipsisType | tuple[slice, ...]


class _Entry(NamedTuple):
    """One array of a container, not read yet; `read` is called with slices, or `...` for all of it."""

    shape: tuple[int, ...]
    numeric: bool
    read: Callable[[Part], npt.NDArray[Any]]
    nodata: float | None = None
    unit: str | None = None


def read_container(
    path: Path,
    dataset: str | None,
    axes: str | None,
    window: Window | None = None,
    wavelengths: npt.NDArray[np.float32] | None = None,
) -> Arrays:
    """Read one array as values `[T, H, W]`, wavelengths in nm `[T]` or None, and nodata `[T, H, W]` or None.

    Args:
        path: an existing file with one of `CONTAINER_SUFFIXES`.
        dataset: the array's name; None takes the only 3-D numeric array, or, if there is none, the only 2-D one.
        axes: the order of the three axes in the file, "THW" or any permutation; None means "HWT" for .mat (MATLAB's
            own order, also for the v7.3 files that store it reversed) and "THW" otherwise. A 2-D array is one band.
        window: the rows and columns to read; None for all. Of .npy and HDF5 files nothing else is read.
        wavelengths: those of the bands in nm, instead of what the file tells; None: as the file tells.
    """
    with _entries(path) as entries:
        entry, axes = _choose(entries, path, dataset, axes)
        shape = _shape(entry, axes)
        part: Part = ...
        if window is not None:
            window.check_within(*shape[1:])
            slices = dict(zip("HW", window.slices, strict=True))
            part = tuple(slices.get(axis, slice(None)) for axis in axes)
        values = entry.read(part)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"the array has type {values.dtype}, expected real numbers")
        values = values[None] if values.ndim == 2 else values.transpose([axes.index(axis) for axis in "THW"])
        nodata, value = None, entry.nodata
        if value is not None:
            nodata = np.isnan(values) if np.isnan(value) else values == value
        if wavelengths is None:
            wavelengths = _wavelengths(entries, len(values), entry.shape, axes)
        return Arrays(values, wavelengths, nodata)


def container_layout(
    path: Path, dataset: str | None, axes: str | None, wavelengths: npt.NDArray[np.float32] | None = None
) -> ArraysLayout:
    """Read the sizes (T, H, W) and the wavelengths of the array that `read_container` would read."""
    with _entries(path) as entries:
        entry, axes = _choose(entries, path, dataset, axes)
        shape = _shape(entry, axes)
        if wavelengths is None:
            wavelengths = _wavelengths(entries, shape[0], entry.shape, axes)
        return ArraysLayout(shape, wavelengths)


@contextmanager
def _entries(path: Path) -> Iterator[dict[str, _Entry]]:
    """Yield the arrays of a file by name, and keep it open while they are read."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        yield {"array": _npy_entry(path)}
    elif suffix == ".npz":
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
            yield _npz_entries(archive, arrays)
    else:
        import h5py

        if suffix == ".mat" and not h5py.is_hdf5(path):
            yield _matlab_entries(path)
        else:
            with h5py.File(path, "r") as file:
                yield _hdf5_entries(file, matlab=suffix == ".mat")


def _choose(entries: dict[str, _Entry], path: Path, dataset: str | None, axes: str | None) -> tuple[_Entry, str]:
    """Return the array to read and the order of its axes; two letters for a 2-D array."""
    axes = axes or ("HWT" if path.suffix.lower() == ".mat" else "THW")
    if sorted(axes) != ["H", "T", "W"]:
        raise ValueError(f'axes is {axes!r}, expected the letters T, H and W in the order of the file, as in "HWT"')
    name = _chosen_name(entries, dataset)
    shape = entries[name].shape
    if len(shape) not in (2, 3):
        raise ValueError(f"array {name!r} has shape {list(shape)}, expected 2 or 3 dimensions")
    return entries[name], axes if len(shape) == 3 else "HW"


def _shape(entry: _Entry, axes: str) -> tuple[int, int, int]:
    sizes = dict(zip(axes, entry.shape, strict=True))
    return sizes.get("T", 1), sizes["H"], sizes["W"]


def _chosen_name(entries: dict[str, _Entry], dataset: str | None) -> str:
    listing = ", ".join(f"{name} {list(entry.shape)}" for name, entry in entries.items()) or "no array"
    if dataset is not None:
        wanted = dataset.strip("/")
        if wanted not in entries:
            raise ValueError(f"no array {dataset!r}; the file has {listing}")
        return wanted
    if len(entries) == 1:
        return next(iter(entries))
    for ndim in (3, 2):
        candidates = [
            name
            for name, entry in entries.items()
            if entry.numeric and len(entry.shape) == ndim and not (ndim == 2 and min(entry.shape) == 1)
        ]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            shapes = ", ".join(f"{name} {list(entries[name].shape)}" for name in candidates)
            raise ValueError(f"several {ndim}-D arrays, name one by dataset=: {shapes}")
    raise ValueError(f"expected a 3-D array of numbers, the file has {listing}")


def _wavelengths(
    entries: dict[str, _Entry], bands: int, sizes: tuple[int, ...], axes: str
) -> npt.NDArray[np.float32] | None:
    vectors = {
        name: entry
        for name, entry in entries.items()
        if name.rsplit("/", 1)[-1].lower() in ("wavelength", "wavelengths")
        and entry.numeric
        and 0 < math.prod(entry.shape) == max(entry.shape, default=0)
    }
    for entry in vectors.values():
        if math.prod(entry.shape) == bands:
            return to_nanometres(entry.read(...), entry.unit)
    for name, entry in vectors.items():
        length = math.prod(entry.shape)
        if len(sizes) == 3 and length in sizes:
            raise ValueError(
                f"{name!r} has {length} entries but the array {list(sizes)} read as {axes} has {bands} bands; "
                "give the order of the axes by axes="
            )
    if len(vectors) == 1 and bands > 1:
        name, entry = vectors.popitem()
        raise ValueError(f"{name!r} has {math.prod(entry.shape)} entries, but the array has {bands} bands")
    return None


def _npy_entry(path: Path) -> _Entry:
    with path.open("rb") as stream:
        shape, dtype = _npy_header(stream)

    def read(part: Part) -> npt.NDArray[Any]:
        if part is not ...:
            return np.lib.format.open_memmap(path, mode="r")[part]
        with path.open("rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    return _Entry(shape, dtype.kind in "biuf", read)


def _npz_entries(archive: zipfile.ZipFile, arrays: Any) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for member in archive.namelist():
        if not member.endswith(".npy"):
            continue
        with archive.open(member) as stream:
            shape, dtype = _npy_header(stream)
        name = member.removesuffix(".npy")
        entries[name] = _Entry(shape, dtype.kind in "biuf", partial(_read_member, arrays, name))
    declared = entries.get("nodata")
    if len(entries) > 1 and declared is not None and declared.shape == () and declared.numeric:
        value = float(entries.pop("nodata").read(...))
        return {name: entry._replace(nodata=value) for name, entry in entries.items()}
    return entries


def _read_member(arrays: Any, name: str, part: Part) -> npt.NDArray[Any]:
    return np.asarray(arrays[name][part])


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _matlab_entries(path: Path) -> dict[str, _Entry]:
    import scipy.io

    numeric = {"double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}

    def load(name: str, part: Part) -> npt.NDArray[Any]:
        return np.asarray(scipy.io.loadmat(path, variable_names=[name], appendmat=False)[name])[part]

    return {
        name: _Entry(tuple(shape), kind in numeric, partial(load, name))
        for name, shape, kind in scipy.io.whosmat(path, appendmat=False)
    }


def _hdf5_entries(file: Any, *, matlab: bool) -> dict[str, _Entry]:
    import h5py

    entries: dict[str, _Entry] = {}

    def visit(name: str, item: Any) -> None:
        kind = _text(item.attrs.get("MATLAB_class", b"")) if matlab else ""
        if not isinstance(item, h5py.Dataset) or name.startswith("#refs#") or item.shape is None:
            return
        numeric = item.dtype.kind in "biuf" and kind not in ("char", "cell") and "MATLAB_empty" not in item.attrs
        fill = np.asarray(item.attrs.get("_FillValue", "none")).reshape(-1)
        nodata = float(fill[0]) if fill.size and fill.dtype.kind in "iuf" else None
        unit = _text(item.attrs.get("units", "")) or None
        shape = tuple(reversed(item.shape)) if matlab else item.shape

        def read(part: Part) -> npt.NDArray[Any]:
            if not matlab:
                return np.asarray(item[part])
            return np.asarray(item[part if part is ... else tuple(reversed(part))]).T

        entries[name] = _Entry(shape, numeric, read, nodata, unit)

    file.visititems(visit)
    return entries


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

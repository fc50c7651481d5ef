"""Arrays out of .npy, .npz, .mat and HDF5 files: which one is the cube, and which of its axes are the bands."""

import math
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .wavelengths import to_nanometres

CONTAINER_SUFFIXES = (".npy", ".npz", ".mat", ".h5", ".hdf5", ".he5")

Arrays = tuple[
    npt.NDArray[Any], npt.NDArray[np.float32] | None, npt.NDArray[np.bool_] | None
]  # values, wavelengths, nodata


class _Entry(NamedTuple):
    """One array of a container, not read yet."""

    shape: tuple[int, ...]
    numeric: bool
    read: Callable[[], npt.NDArray[Any]]
    nodata: float | None = None
    unit: str | None = None


def read_container(path: Path, dataset: str | None, axes: str | None) -> Arrays:
    """Read one array as values `[T, H, W]`, wavelengths in nm `[T]` or None, and nodata `[T, H, W]` or None.

    Args:
        path: an existing file with one of `CONTAINER_SUFFIXES`.
        dataset: the array's name; None takes the only 3-D numeric array, or, if there is none, the only 2-D one.
        axes: the order of the three axes in the file, "THW" or any permutation; None means "HWT" for .mat (MATLAB's
            own order, also for the v7.3 files that store it reversed) and "THW" otherwise. A 2-D array is one band.
    """
    axes = axes or ("HWT" if path.suffix.lower() == ".mat" else "THW")
    if sorted(axes) != ["H", "T", "W"]:
        raise ValueError(f'axes is {axes!r}; expected the letters T, H and W in the order of the file, as in "HWT"')
    suffix = path.suffix.lower()
    if suffix == ".npy":
        with path.open("rb") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
        return _read(axes, {"array": _Entry(array.shape, array.dtype.kind in "biuf", lambda: array)}, dataset)
    if suffix == ".npz":
        return _read_npz(path, axes, dataset)
    import h5py

    if suffix == ".mat" and not h5py.is_hdf5(path):
        return _read(axes, _matlab_entries(path), dataset)
    with h5py.File(path, "r") as file:
        return _read(axes, _hdf5_entries(file, matlab=suffix == ".mat"), dataset)


def _read(axes: str, entries: dict[str, _Entry], dataset: str | None) -> Arrays:
    name = _choose(entries, dataset)
    entry = entries[name]
    values = entry.read()
    if values.dtype.kind not in "biuf":
        raise ValueError(f"array {name!r} has type {values.dtype}; expected real numbers")
    if values.ndim not in (2, 3):
        raise ValueError(f"array {name!r} has shape {list(values.shape)}; expected 2 or 3 dimensions")
    sizes = values.shape
    values = values[None] if values.ndim == 2 else values.transpose([axes.index(axis) for axis in "THW"])
    nodata = None
    if entry.nodata is not None:
        nodata = np.isnan(values) if np.isnan(entry.nodata) else values == entry.nodata
    return values, _wavelengths(entries, len(values), sizes, axes), nodata


def _choose(entries: dict[str, _Entry], dataset: str | None) -> str:
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
            raise ValueError(f"several {ndim}-D arrays, name one with dataset=: {shapes}")
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
            return to_nanometres(entry.read(), entry.unit)
    for name, entry in vectors.items():
        length = math.prod(entry.shape)
        if len(sizes) == 3 and length in sizes:
            raise ValueError(
                f"{name!r} has {length} entries but the array {list(sizes)} read as {axes} has {bands} bands; "
                f"say which axis is which with axes="
            )
    return None


def _read_npz(path: Path, axes: str, dataset: str | None) -> Arrays:
    entries: dict[str, _Entry] = {}
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
        for member in archive.namelist():
            if not member.endswith(".npy"):
                continue
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                read_header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read_header(stream)
            name = member.removesuffix(".npy")
            entries[name] = _Entry(shape, dtype.kind in "biuf", partial(arrays.__getitem__, name))
        return _read(axes, entries, dataset)


def _matlab_entries(path: Path) -> dict[str, _Entry]:
    import scipy.io

    numeric = {"double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}

    def load(name: str) -> npt.NDArray[Any]:
        return np.asarray(scipy.io.loadmat(path, variable_names=[name], appendmat=False)[name])

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
        entries[name] = _Entry(shape, numeric, lambda: item[()].T if matlab else item[()], nodata, unit)

    file.visititems(visit)
    return entries


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

"""Open .npy, .npz, .mat, HDF5 and netCDF files as arrays by name."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .hdf5 import hdf5_arrays
from .stored import Part, StoredArray, StoredArrays

NETCDF_SUFFIXES = (".nc", ".nc4")
CONTAINER_SUFFIXES = (".npy", ".npz", ".mat", ".h5", ".hdf5", ".he5", *NETCDF_SUFFIXES)

# What classic netCDF files hold where nothing was written.
NETCDF_FILL = {
    "i1": -127.0,
    "i2": -32767.0,
    "i4": -2147483647.0,
    "f4": 9.969209968386869e36,
    "f8": 9.969209968386869e36,
}


@contextmanager
def open_arrays(path: Path) -> Iterator[StoredArrays]:
    """Yield the arrays of a file by name, and keep it open while they are read."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        yield {"array": _npy_array(path)}
    elif suffix == ".npz":
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
            yield _npz_arrays(archive, arrays)
    else:
        import h5py

        is_hdf5 = h5py.is_hdf5(path)
        if suffix == ".mat" and not is_hdf5:
            yield _matlab_arrays(path)
        elif suffix in NETCDF_SUFFIXES and not is_hdf5:
            from scipy.io import netcdf_file

            with netcdf_file(path, mmap=False, maskandscale=False) as file:
                yield _netcdf_arrays(file)
        else:
            with h5py.File(path, "r") as file:
                yield hdf5_arrays(file, matlab=suffix == ".mat")


def _npy_array(path: Path) -> StoredArray:
    with path.open("rb") as stream:
        shape, dtype = _npy_header(stream)

    def read(part: Part) -> npt.NDArray[Any]:
        if part is not ...:
            return np.lib.format.open_memmap(path, mode="r")[part]
        with path.open("rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    return StoredArray(shape, dtype.kind in "biuf", dtype, read)


def _npz_arrays(archive: zipfile.ZipFile, arrays: Any) -> StoredArrays:
    found: StoredArrays = {}
    for member in archive.namelist():
        if not member.endswith(".npy"):
            continue
        with archive.open(member) as stream:
            shape, dtype = _npy_header(stream)
        name = member.removesuffix(".npy")
        found[name] = StoredArray(shape, dtype.kind in "biuf", dtype, partial(_read_member, arrays, name))
    return found


def _read_member(arrays: Any, name: str, part: Part) -> npt.NDArray[Any]:
    return np.asarray(arrays[name][part])


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _matlab_arrays(path: Path) -> StoredArrays:
    import scipy.io

    numeric = {"double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}

    def load(name: str, part: Part) -> npt.NDArray[Any]:
        return np.asarray(scipy.io.loadmat(path, variable_names=[name], appendmat=False)[name])[part]

    return {
        name: StoredArray(tuple(shape), kind in numeric, np.dtype(object), partial(load, name))
        for name, shape, kind in scipy.io.whosmat(path, appendmat=False)
    }


def _netcdf_arrays(file: Any) -> StoredArrays:
    """Return the variables of a classic netCDF file, which is no HDF5."""

    def array(variable: Any) -> StoredArray:
        kind = variable.data.dtype.str[1:]
        bare = not hasattr(variable, "_FillValue") and not (kind == "i1" and hasattr(variable, "_Unsigned"))
        fill = NETCDF_FILL.get(kind) if bare else None
        return StoredArray(
            tuple(variable.shape),
            variable.data.dtype.kind in "biuf",
            variable.data.dtype,
            lambda part: np.array(variable.data[part]),
            lambda: (vars(variable)["_attributes"], vars(file)["_attributes"]),
            tuple(variable.dimensions),
            fill,
        )

    return {name: array(variable) for name, variable in file.variables.items()}

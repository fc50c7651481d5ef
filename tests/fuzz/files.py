"""Random files of cubes in every format: each must be read exactly as it was written, or refused.

A file follows from its seed. A failure prints the command that repeats it:

    python -m tests.fuzz.files 123
"""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import rasterio
import scipy.io
import tifffile
from rasterio.errors import NotGeoreferencedWarning

from mmmae.data import read_cube
from mmmae.data.readers.windows import Window

Array = np.ndarray[Any, Any]

NODATA_NAMES = ("_FillValue", "missing_value", "NoData", "Data_Ignore_Value", "nodata")
WAVELENGTH_NAMES = ("wavelength", "wavelengths", "Wavelength", "center_wavelengths", "wl")
AXIS_NAMES = {"T": ("band", "bands", "wavelength_axis"), "H": ("y", "lat", "lines"), "W": ("x", "lon", "samples")}


class Misread(AssertionError):
    """A file was read as something else than what was written."""


@dataclass
class File:
    """What is written, and whether a reader can tell it from the file.

    Attributes:
        path: of the file.
        stored: `[T, H, W]`.
        axes: their order in the file.
        nodata: the stored value that means nodata, or None.
        scale, offset: `stored * scale + offset` was measured.
        wavelengths: `[T]` in nm, or None.
        told: whether the file tells the order of its axes; if not it may be refused.
        cut: whether the file was cut; it may be refused too.
    """

    draw: random.Random
    path: Path
    stored: Array
    axes: str = "THW"
    nodata: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    wavelengths: Array | None = None
    told: bool = True
    cut: bool = False
    beside: dict[str, Array] = field(default_factory=dict)

    @property
    def in_file(self) -> Array:
        """The values in the order of the file."""
        return np.asarray(self.stored.transpose(["THW".index(axis) for axis in self.axes]), order="C")

    def one(self, *choices: Any) -> Any:
        return self.draw.choice(choices)

    def with_nodata(self) -> float:
        """Put a value that means nodata into some pixels, and return it."""
        kind, low = self.stored.dtype.kind, -9999 if self.stored.dtype.itemsize > 1 else -99
        self.nodata = {"f": self.one(-9999.0, -3.4028235e38, 1e20, -1.0), "i": low, "u": 0}[kind]
        hidden = np.random.default_rng(self.draw.randrange(2**31)).random(self.stored.shape) < 0.1
        self.stored[hidden] = self.nodata
        return float(self.stored.dtype.type(self.nodata))

    def with_wavelengths(self) -> Array:
        """Choose wavelengths, and return them in a unit that need not be written."""
        self.wavelengths = np.linspace(400, self.draw.uniform(900, 2500), len(self.stored)).round(2)
        written: Array = self.wavelengths / self.one(1, 1000)
        return written


def write_npy(file: File) -> None:
    _order_by_size(file)
    values = file.in_file
    np.save(file.path, np.asfortranarray(values) if file.one(True, False) else values)


def write_npz(file: File) -> None:
    arrays: dict[str, Array] = {}
    _order_of_container(file, arrays)
    if file.one(True, False):
        arrays["nodata"] = np.array(file.with_nodata())
    save = file.one(np.savez, np.savez_compressed)
    save(file.path, **{file.one("cube", "data", "x"): file.in_file}, **arrays)


def write_mat(file: File) -> None:
    arrays: dict[str, Array] = {}
    _order_of_matlab(file, arrays)
    if file.one(True, False, False):
        arrays["nodata"] = np.array(file.with_nodata())
    native = file.in_file.astype(file.stored.dtype.newbyteorder("="))
    scipy.io.savemat(file.path, {file.one("cube", "img"): native, **arrays}, do_compression=file.one(True, False))


def write_matrix(file: File) -> None:
    """Write bands x pixels for MATLAB, with the size beside it."""
    bands, height, width = file.stored.shape
    matrix = file.stored.transpose(0, 2, 1).reshape(bands, -1).astype(file.stored.dtype.newbyteorder("="))
    rows, columns = file.one(("nRow", "nCol"), ("lines", "cols"), ("H", "W"))
    sizes = {rows: np.float64(height), columns: np.float64(width)}
    scipy.io.savemat(file.path, {"Y": file.one(matrix, matrix.T), **sizes})


def write_mat73(file: File) -> None:
    arrays: dict[str, Array] = {}
    _order_of_matlab(file, arrays)
    with h5py.File(file.path, "w", userblock_size=512) as target:
        for name, array in {"cube": file.in_file, **arrays}.items():
            data = target.create_dataset(name, data=np.atleast_2d(array).T, compression=file.one(None, "gzip"))
            data.attrs["MATLAB_class"] = np.bytes_("double")
    with file.path.open("r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")


def write_hdf5(file: File) -> None:
    arrays: dict[str, Array] = {}
    labelled = file.one(True, False, False)
    _order_of_container(file, arrays, named=labelled)
    nodata = file.with_nodata() if file.one(True, False) else None
    group = file.one("", "a/", "a/b/")
    with h5py.File(file.path, "w") as target:
        chunked = file.one({}, {"chunks": True}, {"compression": "gzip", "shuffle": True})
        native_fill = nodata is not None and nodata != 0 and file.one(True, False, False)
        fill = {"fillvalue": nodata} if native_fill else {}
        data = target.create_dataset(f"{group}cube", data=file.in_file, **chunked, **fill)
        if labelled:
            for axis, letter in enumerate(file.axes):
                data.dims[axis].label = file.one(*AXIS_NAMES[letter])
        for name, array in arrays.items():
            target[f"{file.one(group, '', f'{group}meta/')}{name}"] = array
        if nodata is not None and not native_fill:
            place = file.one(data, data.parent, target)
            place.attrs[file.one(*NODATA_NAMES)] = file.one(nodata, np.array([nodata]), repr(nodata))
        _scaled(file, data.attrs)


def write_netcdf(file: File) -> None:
    arrays: dict[str, Array] = {}
    _order_of_container(file, arrays, named=True)
    nodata = file.with_nodata() if file.one(True, False) else False
    classic = file.one(True, False)
    native = file.in_file.astype(file.stored.dtype.newbyteorder("="))
    with netCDF4.Dataset(file.path, "w", format="NETCDF3_CLASSIC" if classic else "NETCDF4") as target:
        names = [file.one(*AXIS_NAMES[letter]) for letter in file.axes]
        for name, size in zip(names, native.shape, strict=True):
            target.createDimension(name, size)
        variable = target.createVariable("cube", native.dtype, names, fill_value=nodata)
        variable.set_auto_maskandscale(False)
        variable[:] = native
        attributes: dict[str, Any] = {}
        _scaled(file, attributes)
        variable.setncatts(attributes)
        for name, array in arrays.items():
            target.createDimension(f"n_{name}", len(array))
            target.createVariable(name, "f8", (f"n_{name}",))[:] = array


def write_tiff(file: File) -> None:
    nodata = file.with_nodata() if file.one(True, False) else None
    wavelengths = file.with_wavelengths() if file.one(True, False) else None
    unit = "" if wavelengths is None else "nm" if wavelengths[0] > 100 else "um"
    bands, height, width = file.stored.shape
    options: dict[str, Any] = {"interleave": file.one("band", "pixel"), "compress": file.one("none", "deflate", "lzw")}
    if file.one(True, False):
        options |= {"tiled": True, "blockxsize": 16, "blockysize": 16}
    native = file.stored.astype(file.stored.dtype.newbyteorder("="))
    with rasterio.open(
        file.path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=native.dtype.name,
        nodata=nodata, endianness=file.one("LITTLE", "BIG"), photometric="MINISBLACK", **options,
    ) as target:  # fmt: skip
        target.write(native)
        if file.one(True, False, False):
            file.scale, file.offset = file.one(0.0001, 0.5, 2.0), file.one(0.0, -3.0)
            target.scales, target.offsets = [file.scale] * bands, [file.offset] * bands
        if wavelengths is not None:
            for band, value in enumerate(wavelengths, start=1):
                target.set_band_description(band, f"{value} {unit}")


def write_pages(file: File) -> None:
    values = file.stored
    options: dict[str, Any] = file.one({}, {"imagej": values.dtype.str[1:] in ("u1", "u2", "f4")}, {"bigtiff": True})
    with tifffile.TiffWriter(
        file.path, byteorder=None if options.get("imagej") else file.one("<", ">"), **options
    ) as out:
        native = values.astype(values.dtype.newbyteorder("="))
        if options.get("imagej"):
            out.write(native, photometric="minisblack")
        else:
            for band in native:
                how = {"compression": file.one(None, "zlib"), "contiguous": False, "metadata": None}
                out.write(band, photometric="minisblack", **how)


def write_envi(file: File) -> None:
    types = {"u1": 1, "i2": 2, "i4": 3, "f4": 4, "f8": 5, "u2": 12, "u4": 13}
    nodata = file.with_nodata() if file.one(True, False) else None
    interleave = file.one("bsq", "bil", "bip")
    order = {"bsq": (0, 1, 2), "bil": (1, 0, 2), "bip": (1, 2, 0)}[interleave]
    offset = file.one(0, 0, 17, 512)
    bands, height, width = file.stored.shape
    lines = {
        "samples": width, "lines": height, "bands": bands, "header offset": offset, "interleave": interleave,
        "data type": types[file.stored.dtype.str[1:]], "byte order": int(file.stored.dtype.str[0] == ">"),
    }  # fmt: skip
    if nodata is not None:
        lines["data ignore value"] = repr(nodata)
    if file.one(True, False):
        values = file.with_wavelengths()
        lines["wavelength"] = "{" + ", ".join(map(str, values)) + "}"
        unit = {True: ("Nanometers", "nm", ""), False: ("Micrometers", "um", "")}[bool(values[0] > 100)]
        if named := file.one(*unit):
            lines["wavelength units"] = named
    if file.one(True, False, False):
        factor = file.one(10000, 100, 0.5)
        lines["reflectance scale factor"] = factor
        file.scale = 1 / factor
    spelled = file.one(str, str.upper, str.title)
    text = "".join(f"{spelled(key)} = {value}\n" for key, value in lines.items())
    file.path.with_suffix(".hdr").write_text(f"ENVI\n; a comment {{of one line}}\n{text}")
    file.path.write_bytes(bytes(offset) + file.stored.transpose(order).tobytes())


def _scaled(file: File, attributes: Any) -> None:
    if file.one(True, False, False):
        file.scale, file.offset = file.one(0.0001, 0.25, 3.0), file.one(0.0, -2.0)
        attributes["scale_factor"] = file.scale
        if file.offset:
            attributes["add_offset"] = file.offset


def _order_by_size(file: File) -> None:
    """Choose an order of axes that only sizes can tell."""
    bands, height, width = file.stored.shape
    file.axes = file.one("THW", "HWT", "HTW")
    file.told = bands < 16 or (height == width and file.axes == "THW")


def _order_of_container(file: File, arrays: dict[str, Array], *, named: bool = False) -> None:
    _order_by_size(file)
    if file.one(True, False):
        arrays[file.one(*WAVELENGTH_NAMES)] = file.with_wavelengths()
        file.told = True
    if named:
        file.axes, file.told = file.one("THW", "HWT", "HTW", "WHT"), True
    if file.one(True, False):
        arrays["fwhm"] = np.linspace(5, 10, len(file.stored))
    if file.one(True, False):
        arrays["mask_of_pixels"] = np.zeros(7)


def _order_of_matlab(file: File, arrays: dict[str, Array]) -> None:
    file.axes = "HWT"
    if file.one(True, False):
        arrays[file.one(*WAVELENGTH_NAMES)] = file.with_wavelengths()
        file.axes = file.one("HWT", "HWT", "THW", "HTW")
    if file.one(True, False):
        arrays["fwhm"] = np.linspace(5, 10, len(file.stored))


ANY, ENVI = ("u1", "u2", "i2", "u4", "i4", "f4", "f8"), ("u1", "u2", "i2", "i4", "u4", "f4", "f8")
FORMATS: dict[str, tuple[str, Callable[[File], None], tuple[str, ...]]] = {
    "npy": ("a.npy", write_npy, (*ANY, "i1", "i8", "f2")),
    "npz": ("a.npz", write_npz, (*ANY, "i8")),
    "mat": ("a.mat", write_mat, (*ANY, "i1")),
    "matrix": ("a.mat", write_matrix, ANY),
    "mat v7.3": ("a.mat", write_mat73, ANY),
    "hdf5": ("a.h5", write_hdf5, (*ANY, "i1", "i8")),
    "netcdf": ("a.nc", write_netcdf, ("i1", "i2", "i4", "f4", "f8")),
    "tiff": ("a.tif", write_tiff, ANY),
    "pages": ("a.tif", write_pages, ANY),
    "envi": ("a.img", write_envi, ENVI),
}


def draw_file(folder: Path, seed: int) -> File:
    """Write the file of a seed into an empty folder.

    Images have 16 to 31 rows and columns and another number of bands: else another reading of the same bytes would be
    as good where only sizes tell the order of axes.
    """
    draw = random.Random(seed)
    name, write, kinds = FORMATS[draw.choice(list(FORMATS))]
    height, width = draw.randrange(16, 32), draw.randrange(16, 32)
    width = draw.choice((width, width, height))
    bands = draw.choice([count for count in range(2, 41) if count not in (height, width)])
    dtype = np.dtype(draw.choice("<>") + draw.choice(kinds))
    rng = np.random.default_rng(seed)
    shape = (bands, height, width)
    values = rng.normal(50, 9, shape) if dtype.kind == "f" else rng.integers(1, 120, shape)
    file = File(draw, folder / name, values.astype(dtype))
    write(file)
    if draw.random() < 0.2:
        whole = file.path.read_bytes()
        file.path.write_bytes(whole[: draw.randrange(len(whole))])
        file.cut = True
    return file


def check_file(folder: Path, seed: int) -> bool:
    """Read the file of a seed, all of it and a window; return whether it was refused.

    Raises:
        Misread: it was read wrongly, or refused though it tells everything.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        file = draw_file(folder, seed)
    height, width = file.stored.shape[1:]
    window = Window(2, 3, height - 5, width - 4)
    try:
        cube, part = read_cube(file.path), read_cube(file.path, window=window)
    except ValueError as error:
        if str(file.path) not in str(error):
            raise Misread(f"the message does not name the file: {error}") from error
        if file.told and not file.cut:
            raise Misread(f"a whole {file.path.name} was refused: {error}") from error
        return True
    nodata = (
        np.zeros(file.stored.shape, bool) if file.nodata is None else file.stored == file.stored.dtype.type(file.nodata)
    )
    values = file.stored.astype(np.float64) * file.scale + file.offset
    expected = np.where(nodata, 0, values).astype(np.float32)
    if cube.values.shape != expected.shape:
        raise Misread(f"{list(expected.shape)} was read as {list(cube.values.shape)}")
    if not np.array_equal(cube.nodata.numpy(), nodata):
        raise Misread(f"{(cube.nodata.numpy() != nodata).sum()} values are nodata or not by mistake")
    if not np.array_equal(cube.values.numpy(), expected):
        raise Misread(f"{(cube.values.numpy() != expected).sum()} values differ")
    found = None if cube.wavelengths is None else cube.wavelengths.numpy()
    if found is None or file.wavelengths is None:
        alike = found is file.wavelengths
    else:
        alike = np.allclose(found, file.wavelengths, rtol=1e-5)
    if not alike:
        raise Misread(f"wavelengths are {found}, expected {file.wavelengths}")
    rows, columns = window.slices
    if not np.array_equal(part.values, cube.values[:, rows, columns]):
        raise Misread("a window differs from the whole")
    return False


def check_files(seeds: Iterable[int]) -> tuple[int, list[str]]:
    """Check the files of seeds; return how many were refused, and the failures with the commands that repeat them."""
    refused, failures = 0, []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                refused += check_file(Path(folder), seed)
            except Misread as error:
                failures.append(f"python -m tests.fuzz.files {seed}: {error}")
    return refused, failures


if __name__ == "__main__":
    print(check_files(int(seed) for seed in sys.argv[1:]))

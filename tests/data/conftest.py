"""Fixtures of the data tests: files written by them, and real scenes if they are installed."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io

WriteRaster = WriteCube = Callable[..., Path]


@pytest.fixture(scope="session")
def scenes() -> Path:
    """The folder of five TerraMesh scenes, in `MMMAE_DATA` or in `shared/data` next to the checkout."""
    root = Path(os.environ.get("MMMAE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    folder = root / "terramesh"
    if not (folder / "S2L2A").is_dir():
        pytest.skip(
            f"needs the TerraMesh scenes terramesh/{{S2L2A,S1RTC,DEM}} in the folder MMMAE_DATA names, not in {root}"
        )
    return folder


@pytest.fixture
def write_raster() -> WriteRaster:
    """Write `[T, H, W]` as a GeoTIFF (.tif) or an ENVI pair (.img and .hdr); further keywords are rasterio's."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    def write(path: Path, values: np.ndarray[Any, Any], **options: Any) -> Path:
        options.setdefault("driver", "ENVI" if path.suffix == ".img" else "GTiff")
        count, height, width = values.shape
        tags, descriptions = options.pop("tags", {}), options.pop("descriptions", ())
        mask = options.pop("mask", None)
        with warnings.catch_warnings(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(
                path, "w", count=count, height=height, width=width, dtype=values.dtype.name, **options
            ) as target:
                target.write(values)
                for band, text in enumerate(descriptions, start=1):
                    target.set_band_description(band, text)
                for band, pairs in tags.items():
                    target.update_tags(band, **pairs)
                if mask is not None:
                    target.write_mask(mask)
        return path

    return write


@pytest.fixture
def write_cube(write_raster: WriteRaster) -> WriteCube:
    """Write `[T, H, W]` in the format that the suffix names, in the axis order that it has by default."""

    def write(path: Path, values: np.ndarray[Any, Any], **options: Any) -> Path:
        is_raster = path.suffix in (".tif", ".tiff", ".img")
        return (write_raster if is_raster else write_container)(path, values, **options)

    return write


@pytest.fixture
def values() -> np.ndarray[Any, Any]:
    """A float32 cube `[5, 6, 7]` whose three sizes differ."""
    return np.random.default_rng(0).uniform(1, 2, (5, 6, 7)).astype(np.float32)


def write_container(
    path: Path, values: np.ndarray[Any, Any], wavelengths: np.ndarray[Any, Any] | None = None, name: str = "cube"
) -> Path:
    """Write an array file, with `wavelengths` beside the array `name`."""
    hwt = np.ascontiguousarray(values.transpose(1, 2, 0))
    extra = {} if wavelengths is None else {"wavelengths": wavelengths}
    if path.name.endswith("v73.mat"):
        with h5py.File(path, "w", userblock_size=512) as file:
            for key, array in {name: hwt, **extra}.items():
                dataset = file.create_dataset(key, data=np.atleast_2d(array).T)  # MATLAB writes its axes reversed
                dataset.attrs["MATLAB_class"] = np.bytes_("double")
        with path.open("r+b") as stream:
            stream.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    elif path.suffix == ".mat":
        scipy.io.savemat(path, {name: hwt, **extra}, do_compression=True)
    elif path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **{name: values, **extra})
    else:
        with h5py.File(path, "w") as file:
            for key, array in {name: values, **extra}.items():
                file[key] = array
    return path

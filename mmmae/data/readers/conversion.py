"""Say how files that are not read can be converted to one that is."""

import shlex
from pathlib import Path

HDF4, HDF5, JPEG2000 = b"\x0e\x03\x13\x01", b"\x89HDF\r\n\x1a\n", b"\x00\x00\x00\x0cjP  "


def conversion(path: Path) -> str | None:
    """Return what a file of an unknown suffix is and how to convert it, as a phrase; None if its content is unknown."""
    with path.open("rb") as file:
        start = file.read(8)
    name, target = shlex.quote(path.name), shlex.quote(f"{path.stem}.tif")
    if start.startswith(HDF4):
        return (
            f"is HDF4, which is not read: gdal_translate {name} {target} converts it; of several arrays, which "
            f"gdalinfo {name} lists as SUBDATASET_n_NAME=..., gdal_translate '...' {target} converts one"
        )
    if start == HDF5:
        return f"is HDF5: give its name the suffix .h5, or .he5 for HDF-EOS5, instead of {path.suffix or 'none'}"
    if start == JPEG2000:
        return f"is JPEG 2000, which is not read: gdal_translate {name} {target} converts it"
    return None


def stacking(path: Path, pattern: str) -> str:
    """Return how to stack the files of a scene of one file a band, as a phrase."""
    return (
        f"is one band of a scene: stack them by gdalbuildvrt -separate scene.vrt {pattern} and "
        f"gdal_translate scene.vrt scene.tif in the folder {path.parent}, and take scene.tif or the bands out of it"
    )

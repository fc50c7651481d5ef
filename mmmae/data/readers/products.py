"""Layouts of sensors' products: which arrays hold their cube, in which order, and what their numbers mean.

Containers are known by the names of their arrays. Other files are read by the general rules of `containers`.
"""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from .arrays import Arrays, ArraysLayout
from .conversion import stacking
from .declared import Scaling, is_nodata, numbers_in
from .stored import Attributes, StoredArrays


class Piece(NamedTuple):
    """One array of a product's cube.

    Attributes:
        array: pattern of its name.
        axes: their order in the file.
        wavelengths: pattern of the name of the array that holds them, or "@NAME" for an attribute of the file; None for
            an attribute of the array itself.
        good: pattern of the name of an array that is 0 for bands without data, or None.
        scaling: returns the scaling by the file's attributes; None: the array's attributes tell, as anywhere.
        nodata: a stored value that means nothing, besides those that the file declares.
    """

    array: str
    axes: str
    wavelengths: str | None = None
    good: str | None = None
    scaling: Callable[[Attributes], Scaling] | None = None
    nodata: float | None = None


class Product(NamedTuple):
    """A product; its cube is that of its pieces, joined and ordered by wavelength."""

    name: str
    pieces: tuple[Piece, ...]


def _prisma_radiance(detector: str) -> Callable[[Attributes], Scaling]:
    def scaling(root: Attributes) -> Scaling:
        divisor, offset = (_number(root, f"{name}_{detector}") for name in ("ScaleFactor", "Offset"))
        return Scaling(1 / divisor, -offset, f"values of {detector.upper()} are divided by {divisor:g}")

    return scaling


def _prisma_reflectance(detector: str) -> Callable[[Attributes], Scaling]:
    def scaling(root: Attributes) -> Scaling:
        low, high = (_number(root, f"L2Scale{detector}{end}") for end in ("Min", "Max"))
        note = f"values of {detector.upper()} are scaled from 0..65535 to {low:g}..{high:g}"
        return Scaling((high - low) / 65535, low, note)

    return scaling


def _prisma(level: str, scaling: Callable[[str], Callable[[Attributes], Scaling]], nodata: float | None) -> Product:
    fields = f"HDFEOS/SWATHS/PRS_{level}_HCO/Data Fields"
    return Product(
        f"PRISMA {level[:2]}",
        tuple(
            Piece(f"{fields}/{cube}_Cube", "HTW", f"@List_Cw_{detector}", None, scaling(detector), nodata)
            for cube, detector in (("VNIR", "Vnir"), ("SWIR", "Swir"))
        ),
    )


def _pace(quantity: str) -> Product:
    return Product(
        "PACE OCI L1B",
        tuple(
            Piece(f"observation_data/{quantity}_{name}", "THW", f"sensor_band_parameters/{name}_wavelength")
            for name in ("blue", "red", "SWIR")
        ),
    )


def _emit(quantity: str) -> Product:
    parameters = "sensor_band_parameters"
    return Product("EMIT", (Piece(quantity, "HWT", f"{parameters}/wavelengths", f"{parameters}/good_wavelengths"),))


_TANAGER = "HDFEOS/SWATHS/HYP/Data Fields"

PRODUCTS = (
    _prisma("L1", _prisma_radiance, None),
    _prisma("L2[BCD]", _prisma_reflectance, 0),
    _pace("rhot"),
    _pace("Lt"),
    Product("PACE OCI L2", (Piece("geophysical_data/rhos", "HWT", "sensor_band_parameters/wavelength_3d"),)),
    Product("PACE OCI L2", (Piece("geophysical_data/Rrs", "HWT", "sensor_band_parameters/wavelength_3d"),)),
    _emit("reflectance"),
    _emit("radiance"),
    Product("AVIRIS", (Piece("reflectance/reflectance", "THW", "reflectance/wavelength"),)),
    Product("AVIRIS", (Piece("radiance/radiance", "THW", "radiance/wavelength"),)),
    Product(
        "NEON",
        (Piece("*/Reflectance/Reflectance_Data", "HWT", "*/Reflectance/Metadata/Spectral_Data/Wavelength"),),
    ),
    Product("Tanager", (Piece(f"{_TANAGER}/surface_reflectance", "THW"),)),
    Product("Tanager", (Piece(f"{_TANAGER}/toa_radiance", "THW"),)),
)


def find_product(arrays: StoredArrays) -> tuple[str, list[tuple[str, Piece]]]:
    """Return the name of the product whose arrays a file has, and its pieces with their arrays' names; else "", []."""
    for product in PRODUCTS:
        pieces = []
        for piece in product.pieces:
            found = matching(arrays, piece.array)
            sources = [piece.wavelengths] if piece.wavelengths and not piece.wavelengths.startswith("@") else []
            if len(found) != 1 or not all(len(matching(arrays, source)) == 1 for source in sources):
                break
            pieces.append((found[0], piece))
        else:
            return product.name, pieces
    return "", []


def matching(arrays: StoredArrays, pattern: str) -> list[str]:
    """Return the names of the arrays that fit a pattern."""
    return [name for name in arrays if fnmatchcase(name, pattern)]


_SPECTRAL_IMAGE = re.compile(r"(?P<scene>.+)-SPECTRAL_IMAGE(_(?P<detector>VNIR|SWIR))?(_COG)?\.tiff?", re.IGNORECASE)
_HYPERION_BAND = re.compile(r"(?P<scene>EO1H\w+_B)\d{3}(?P<rest>_L1\w+\.tiff?)", re.IGNORECASE)
_LARGEST_XML = 2**26


def with_metadata(path: Path, image: Arrays) -> Arrays:
    """Return a TIFF image with what the METADATA.XML beside it says of its bands, if it is one of EnMAP or DESIS.

    Args:
        path: of the image, SCENE-SPECTRAL_IMAGE.TIF; for EnMAP's L1B also SCENE-SPECTRAL_IMAGE_VNIR.TIF.
        image: its bands, as read from it.

    Raises:
        ValueError: the file beside it is no XML, or does not list these bands; or the image is one band of a Hyperion
            scene.
    """
    found = _metadata(path, len(image.values))
    if found is None:
        return image
    hidden = is_nodata(image.values, sorted(found.nodata))
    if hidden is not None and image.nodata is not None:
        hidden |= image.nodata
    nodata = image.nodata if hidden is None else hidden
    return Arrays(image.values, found.wavelengths, nodata, found.scale, found.offset, (*image.notes, found.note))


def with_metadata_layout(path: Path, layout: ArraysLayout) -> ArraysLayout:
    """Return the layout of a TIFF image with the wavelengths that `with_metadata` would give."""
    found = _metadata(path, layout.shape[0])
    return layout if found is None else ArraysLayout(layout.shape, found.wavelengths, (*layout.notes, found.note))


class _Metadata(NamedTuple):
    wavelengths: npt.NDArray[np.float32]  # [T] in nm
    scale: npt.NDArray[np.float64]
    offset: npt.NDArray[np.float64]
    nodata: set[float]  # stored values
    note: str


def _metadata(path: Path, bands: int) -> _Metadata | None:
    if band := _HYPERION_BAND.fullmatch(path.name):
        raise ValueError(stacking(path, f"{band['scene']}*{band['rest']}"))
    named = _SPECTRAL_IMAGE.fullmatch(path.name)
    if named is None:
        return None
    name = f"{named['scene']}-METADATA.XML".lower()
    beside = next((file for file in sorted(path.parent.iterdir()) if file.name.lower() == name), None)
    if beside is None:
        return None
    if beside.stat().st_size > _LARGEST_XML:
        raise ValueError(f"{beside.name} is too large for metadata of bands")
    try:
        root = ElementTree.fromstring(beside.read_bytes())
        listed = _bands_listed(root)
        nodata = {float(item.text or "") for item in root.iter("backgroundValue")}
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{beside.name} cannot be read: {error}") from None  # or only its cause is shown
    detector = (named["detector"] or "").upper()
    if detector:  # of EnMAP's L1B, whose metadata lists the bands of VNIR and then those of SWIR
        listed = listed[:bands] if detector == "VNIR" else listed[-bands:]
    if len(listed) != bands:
        raise ValueError(f"{beside.name} lists {len(listed)} bands, the image has {bands}")
    wavelengths, scale, offset = np.array(listed, np.float64).T
    if not (np.isfinite(wavelengths + scale + offset) & (wavelengths > 0) & (scale != 0)).all():
        raise ValueError(f"{beside.name} has a band without wavelength, gain or offset")
    note = f"wavelengths, gains and offsets are those of {beside.name}"
    return _Metadata(wavelengths.astype(np.float32), scale, offset, nodata, note)


def _bands_listed(root: ElementTree.Element) -> list[tuple[float, float, float]]:
    """Return wavelength, gain and offset of each band; EnMAP and DESIS spell the names in different case."""
    bands = []
    for parent in root.iter("bandCharacterisation"):
        for band in parent:
            fields = {item.tag.lower(): float(item.text or "") for item in band if item.tag.lower() in _FIELDS}
            if len(fields) == len(_FIELDS):
                bands.append((fields[_FIELDS[0]], fields[_FIELDS[1]], fields[_FIELDS[2]]))
    return bands


_FIELDS = ("wavelengthcenterofband", "gainofband", "offsetofband")


def _number(root: Attributes, name: str) -> float:
    numbers = numbers_in(name, root.get(name, ()))
    if len(numbers) != 1 or not np.isfinite(numbers[0]):
        raise ValueError(f"the file lacks the attribute {name!r}, a number")
    return float(numbers[0])

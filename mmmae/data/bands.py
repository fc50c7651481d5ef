"""Selection of bands: by number, by wavelength, or by interpolation between wavelengths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .readers.cube import Cube

CHOICES = "bands=, wavelengths= or resample= (--bands, --wavelengths, --resample)"
MOST_BANDS = 65_536
EXPECTED = "numbers and ranges of bands like 0-189,213, or intervals in nm like 400-1340,1460-1790nm"
_ITEM = re.compile(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?")
_OF = re.compile(r"(.+) of (\d+)")


@dataclass(frozen=True)
class BandChoice:
    """The bands to read: by number, in intervals, nearest to wavelengths, or interpolated; all if none is given.

    Attributes:
        bands: 0-based numbers.
        wavelengths: in nm; the nearest band of each is read.
        resample: in nm; spectra are interpolated there.
        tolerance: largest distance in nm from the bands of a file.
        intervals: in nm, with their ends; all bands in them are read.
        total: how many bands a file must have for the numbers to mean what they did; None: any.
    """

    bands: Sequence[int] | None = None
    wavelengths: Sequence[float] | None = None
    resample: Sequence[float] | None = None
    tolerance: float = 10.0
    intervals: Sequence[tuple[float, float]] | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        if sum(choice is not None for choice in (self.bands, self.wavelengths, self.resample, self.intervals)) > 1:
            raise ValueError("expected only one of bands=, wavelengths= and resample=")
        for name in ("bands", "wavelengths", "resample"):
            given = getattr(self, name)
            for value, count in Counter(() if given is None else [float(value) for value in given]).items():
                if count > 1:
                    raise ValueError(f"{name} has {value:g} twice")

    @classmethod
    def parse(cls, text: str, tolerance: float = 10.0) -> BandChoice:
        """Read numbers and ranges, "0-189,213", or intervals, "400-1340,1460-1790nm".

        With " of 224" behind the numbers, files must have 224 bands.

        Raises:
            ValueError: the text is neither.
        """
        listed = _OF.fullmatch(text.strip())
        items = [item.strip() for item in (listed[1] if listed else text).split(",")]
        in_nm = any(item.lower().endswith("nm") for item in items)
        found = [_ITEM.fullmatch(re.sub(r"\s*nm$", "", item, flags=re.IGNORECASE)) for item in items]
        ends = [(float(item[1]), float(item[2] or item[1])) for item in found if item]
        whole = all(item and "." not in item[0] for item in found)
        if (
            len(ends) < len(items)
            or any(low > high for low, high in ends)
            or not (in_nm or whole)
            or (in_nm and listed)
        ):
            raise ValueError(f"bands is {text!r}, expected {EXPECTED}")
        if in_nm:
            if single := [low for low, high in ends if low == high]:
                raise ValueError(
                    f"bands is {text!r}: {single[0]:g} nm is no interval; wavelengths= takes the nearest band"
                )
            return cls(intervals=ends, tolerance=tolerance)
        if max(high for _, high in ends) >= MOST_BANDS:
            raise ValueError(f"bands is {text!r}, expected numbers below {MOST_BANDS}")
        numbers = [number for low, high in ends for number in range(int(low), int(high) + 1)]
        return cls(numbers, tolerance=tolerance, total=int(listed[2]) if listed else None)

    @property
    def all_bands(self) -> bool:
        return self.bands is None and not self.by_wavelength

    @property
    def by_wavelength(self) -> bool:
        return self.wavelengths is not None or self.resample is not None

    def resolved(self, count: int, wavelengths: Tensor | None) -> BandChoice:
        """Return the choice without intervals, for files of `count` bands at `wavelengths` in nm.

        Raises:
            ValueError: files have no wavelengths, no band in an interval, or another number of bands than was expected.
        """
        if self.total not in (None, count):
            numbers = () if self.bands is None else self.bands
            raise ValueError(
                f"{_ranges(numbers)} are bands of files with {self.total} bands, this file has {count}; "
                f"choose bands by {CHOICES}"
            )
        if self.intervals is None:
            return self
        listing = ", ".join(f"{low:g}-{high:g}" for low, high in self.intervals)
        if wavelengths is None:
            raise ValueError(
                f"cannot select {listing} nm: the file has no wavelengths; select bands by number, or give wavelengths"
            )
        nm = wavelengths.tolist()
        spectrum = f"{count} from {min(nm):g} to {max(nm):g} nm"
        for low, high in self.intervals:
            if not any(low <= value <= high for value in nm):
                raise ValueError(f"no band in {low:g}-{high:g} nm: the file has {spectrum}")
        inside = [any(low <= value <= high for low, high in self.intervals) for value in nm]
        return replace(self, bands=[band for band, chosen in enumerate(inside) if chosen], intervals=None)

    def apply(self, cube: Cube) -> Cube:
        """Return the chosen bands of `cube`."""
        if self.resample is not None:
            return resample_bands(cube, self.resample, tolerance=self.tolerance)
        if self.all_bands:
            return cube
        return select_bands(cube, bands=self.bands, wavelengths=self.wavelengths, tolerance=self.tolerance)

    def labels(self, count: int) -> list[str]:
        """Return the name of each chosen band of a file with `count` bands."""
        chosen = (given for given in (self.resample, self.wavelengths, self.bands) if given is not None and len(given))
        return [f"{value:.9g}" for value in next(chosen, range(count))]

    def describe(self, labels: Iterable[str]) -> str:
        """Return a phrase that lists the bands named `labels`."""
        listing = ",".join(labels)
        if not self.by_wavelength:
            return f"bands {listing}"
        return f"{'spectra at' if self.resample is not None else 'wavelengths'} {listing} nm"


def described_choice(selection: str) -> dict[str, Any]:
    """Return as arguments of `PairedFolder` the choice that a phrase in statistics lists; none if it is all bands."""
    kind, _, listing = selection.replace("spectra at", "resample").partition(" ")
    if kind in ("resample", "wavelengths"):
        return {kind: [float(value) for value in listing.removesuffix(" nm").split(",")]}
    numbers = _OF.fullmatch(listing)
    if kind != "bands" or numbers is None or numbers[1].split(",") == [str(band) for band in range(int(numbers[2]))]:
        return {}
    return {"bands": listing}


def select_bands(
    cube: Cube,
    *,
    bands: Sequence[int] | None = None,
    wavelengths: Sequence[float] | None = None,
    tolerance: float = 10.0,
) -> Cube:
    """Return a cube with some bands of another, in the order given.

    Args:
        cube: the cube to select from.
        bands: 0-based band numbers.
        wavelengths: in nm, instead of `bands`: the nearest band of each is taken.
        tolerance: largest distance in nm of a wavelength from its nearest band.

    Raises:
        ValueError: both or neither of `bands` and `wavelengths` are given, a band does not exist, the cube has no
            wavelengths, no band is near enough, or two wavelengths share their nearest band.
    """
    if (bands is None) == (wavelengths is None):
        raise ValueError("expected either bands= or wavelengths=")
    count = len(cube.values)
    if bands is not None:
        chosen = [int(band) for band in bands]
        missing = [band for band in chosen if not 0 <= band < count]
        if missing:
            raise ValueError(f"no band {_listing(missing)}: the file has bands 0 to {count - 1}")
    else:
        assert wavelengths is not None
        chosen = _nearest_bands(cube.wavelengths, [float(value) for value in wavelengths], tolerance)
    if not chosen:
        raise ValueError("no band is selected, expected at least one")
    index = torch.tensor(chosen)
    kept = None if cube.wavelengths is None else cube.wavelengths[index]
    return Cube(cube.values[index], kept, cube.nodata[index], cube.notes)


def resample_bands(cube: Cube, wavelengths: Sequence[float], *, tolerance: float = 10.0) -> Cube:
    """Interpolate each spectrum linearly at `wavelengths`, in the order given.

    A value is nodata if a band that it is interpolated from is nodata. Beyond the first and the last band, up to
    `tolerance`, the value of that band is repeated.

    Args:
        cube: at least one band, in any order.
        wavelengths: in nm.
        tolerance: in nm.

    Raises:
        ValueError: the cube has no wavelengths, or one of `wavelengths` is too far outside their range.
    """
    wanted = [float(value) for value in wavelengths]
    if not wanted:
        raise ValueError("wavelengths is empty, expected at least one")
    if cube.wavelengths is None:
        raise ValueError(f"cannot resample at {_listing(wanted)} nm: the file has no wavelengths")
    available, order = cube.wavelengths.double().sort()
    low, high = float(available[0]), float(available[-1])
    beyond = [value for value in wanted if not low - tolerance <= value <= high + tolerance]
    if beyond:
        raise ValueError(
            f"{_listing(beyond)} nm is more than {tolerance:g} nm outside the file's bands, {low:g} to {high:g} nm"
        )
    target = torch.tensor(wanted, dtype=torch.float64).clamp(low, high)
    above = torch.searchsorted(available, target)
    below = (above - (available[above] > target).long()).clamp_min(0)
    distance = available[above] - available[below]
    share = torch.where(distance > 0, (target - available[below]) / distance.clamp_min(1e-9), 0.0).float()
    below, above, share = order[below], order[above], share[:, None, None]
    nodata = cube.nodata[below] | (cube.nodata[above] & (share > 0))
    values = torch.lerp(cube.values[below], cube.values[above], share).masked_fill_(nodata, 0.0)
    return Cube(values, torch.tensor(wanted), nodata, cube.notes)


def _nearest_bands(available: Tensor | None, wanted: list[float], tolerance: float) -> list[int]:
    if available is None:
        raise ValueError(
            f"cannot select {_listing(wanted)} nm: the file has no wavelengths; select bands by number (bands=, "
            "--bands), or give them (--wavelengths FILE)"
        )
    chosen: list[int] = []
    for value in wanted:
        distance = (available.double() - value).abs()
        band = int(distance.argmin())
        if not float(distance[band]) <= tolerance:
            low, high = float(available.min()), float(available.max())
            raise ValueError(
                f"no band within {tolerance:g} nm of {value:g} nm: the file has {len(available)} bands from {low:g} to "
                f"{high:g} nm, the nearest is {float(available[band]):g} nm"
            )
        if band in chosen:
            other = wanted[chosen.index(band)]
            raise ValueError(f"{other:g} and {value:g} nm share the nearest band, {float(available[band]):g} nm")
        chosen.append(band)
    return chosen


def _listing(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _ranges(bands: Sequence[int]) -> str:
    """Return numbers as ranges: 0-3,7."""
    there = set(bands)
    starts = [band for band in bands if band - 1 not in there]
    ends = [band for band in bands if band + 1 not in there]
    pairs = zip(sorted(starts), sorted(ends), strict=True)
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in pairs)

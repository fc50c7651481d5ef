"""Selection of bands: by number, by the nearest wavelength, or by interpolation between wavelengths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .readers.cube import Cube


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
        chosen = _nearest_bands(cube.wavelengths, [float(value) for value in wavelengths or ()], tolerance)
    if not chosen:
        raise ValueError("no band is selected, expected at least one")
    index = torch.tensor(chosen)
    kept = None if cube.wavelengths is None else cube.wavelengths[index]
    return Cube(cube.values[index], kept, cube.nodata[index])


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
    return Cube(values, torch.tensor(wanted), nodata)


def _nearest_bands(available: Tensor | None, wanted: list[float], tolerance: float) -> list[int]:
    if available is None:
        raise ValueError(
            f"cannot select {_listing(wanted)} nm: the file has no wavelengths; select bands by number (bands=)"
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

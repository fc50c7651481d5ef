"""Find values that fill a file where nothing was measured, and that the file does not declare as nodata."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from .readers.cube import Cube

# Numbers that writers use for nodata and that measurements rarely reach; beyond LARGE no measurement is.
SENTINELS = (-99.0, -999.0, -9999.0, -99999.0, -999999.0, -32767.0, -32768.0, -28672.0, -(2.0**31), 2.0**31, 99999.0)
LARGE = 1e15
# Values at which measurements end by saturation or clipping: they are fill values only of whole spectra, or far away.
ENDS = (0.0, 255.0, 65535.0, 32767.0)

PIXELS, VALUES = 8192, 2**17  # of a file, at most
FEWEST = 4  # as many values are no coincidence
SHARE = 0.005  # of the pixels, for values that measurements reach too
FEW_BANDS = 3  # of so many bands or more, whole spectra of one value are no coincidence
NARROW_GAP, GAP, WIDE_GAP = (
    0.002,
    0.02,
    0.1,
)  # of the range of the other values, within which fewer than 1/20 as many values lie


class FillValues:
    """Gathers the values of a file strip by strip, and judges which of them are fill values.

    A fill value forms a spike in the histogram with next to nothing around it: a number that writers use for nodata, or
    one that whole spectra have.

    Args:
        pixels: the number of pixels of the file, of which at most 8192 are kept, spread evenly.
        bands: its number of bands.
    """

    def __init__(self, pixels: int, bands: int) -> None:
        golden = (math.sqrt(5) - 1) / 2  # as for percentiles: evenly spread, aligned with no image width
        count = min(pixels, PIXELS, max(1, VALUES // bands))
        places = (np.arange(count) * golden % 1 * pixels).astype(np.int64) if count < pixels else np.arange(pixels)
        self._places, self._seen = np.sort(places), 0  # of the pixels kept, the same whatever the strips are
        self._sample: list[npt.NDArray[np.float32]] = []
        self._counts: dict[float, int] = {}

    def add(self, cube: Cube, low: torch.Tensor, high: torch.Tensor) -> None:
        """Add the next strip, whose bands have minima `low` and maxima `high` `[T]`, infinite if all are nodata."""
        for value in {float(low.min()), float(high.max())}:
            if is_sentinel(value):
                bands = ((low == value) | (high == value)).nonzero()[:, 0]
                found = ((cube.values[bands] == value) & ~cube.nodata[bands]).sum()
                self._counts[value] = self._counts.get(value, 0) + int(found)
        values, hidden = cube.values.flatten(1).numpy(), cube.nodata.flatten(1).numpy()
        first, end = np.searchsorted(self._places, (self._seen, self._seen + values.shape[1]))
        numbers = self._places[first:end] - self._seen
        kept = values.take(numbers, axis=1)
        kept[hidden.take(numbers, axis=1)] = np.nan
        self._sample.append(kept)
        self._seen += values.shape[1]

    @property
    def sample(self) -> npt.NDArray[np.float32]:
        """The values of the pixels kept, `[T, pixels]`, NaN where nodata."""
        return np.concatenate(self._sample, axis=1)

    def found(self) -> Iterator[tuple[float, str]]:
        """Yield each fill value, with a phrase that says how much of the file has it."""
        sample = self.sample
        for _ in range(FEWEST):
            value = next((value for value in self._candidates(sample) if self._is_fill(value, sample)), None)
            if value is None:
                return
            hits = sample == np.float32(value)
            share = int(np.count_nonzero(hits)) / max(1, int(np.count_nonzero(~np.isnan(sample))))
            exact = self._counts.get(value, 0)
            yield value, f"{exact} values" if share < 0.001 and exact else f"{share:.1%} of the values"
            sample = np.where(hits, np.float32(np.nan), sample)
            self._counts.pop(value, None)

    def _candidates(self, sample: npt.NDArray[np.float32]) -> Iterator[float]:
        yield from self._counts
        if np.isnan(sample).all():
            return
        yield from {float(np.nanmin(sample)), float(np.nanmax(sample))}
        spectra = self._constant_spectra(sample)
        if len(spectra):
            values, counts = np.unique(spectra, return_counts=True)
            yield float(values[counts.argmax()])

    def _constant_spectra(self, sample: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the values of the pixels that have one value in all of their bands, at least three."""
        if len(sample) < FEW_BANDS:
            return np.empty(0, np.float32)
        measured = sample[:, ~np.isnan(sample).all(0)]
        if not measured.size:
            return np.empty(0, np.float32)
        low = np.nanmin(measured, axis=0)
        return np.asarray(low[low == np.nanmax(measured, axis=0)])

    def _is_fill(self, value: float, sample: npt.NDArray[np.float32]) -> bool:
        if not math.isfinite(value):
            return False
        hits = sample == np.float32(value)
        count = int(np.count_nonzero(hits))
        if count < SHARE * hits.size and not is_sentinel(value):
            return False
        others = sample[~hits & ~np.isnan(sample)]
        if others.size < FEWEST:
            return False
        low, high = np.percentile(others[:: max(1, others.size // 2**16)].astype(np.float64), (1, 99))
        some = others[:: max(1, others.size // 2**12)]
        if high <= low or len(np.unique(some)) < 2 * FEWEST:  # classes rather than measurements
            return False
        share = count / (others.size + count)
        if is_sentinel(value):
            enough = self._counts.get(value, count) >= FEWEST
            return enough and self._is_alone(value, others, max(share, 1 / others.size), GAP * (high - low))
        if len(sample) >= FEW_BANDS:
            with_it, whole = hits.any(0), (hits | np.isnan(sample)).all(0) & hits.any(0)
            mostly = int(whole.sum()) >= 0.8 * int(with_it.sum())
            gap = NARROW_GAP if value == 0 else GAP  # measurements end at 0 too, but not in all bands of a pixel
            return mostly and self._is_alone(value, others, share, gap * (high - low))
        return value in ENDS and self._is_alone(value, others, share, WIDE_GAP * (high - low))

    def _is_alone(self, value: float, others: npt.NDArray[np.float32], share: float, gap: float) -> bool:
        near = np.count_nonzero(np.abs(others.astype(np.float64) - value) <= gap) / others.size
        return bool(near <= share / 20)


def is_sentinel(value: float) -> bool:
    """Return whether a value is one that writers use for nodata."""
    return LARGE < abs(value) < math.inf or value in SENTINELS

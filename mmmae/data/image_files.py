"""The image files of one modality: reads the requested bands, and compares each file with the first."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .bands import resample_bands, select_bands
from .readers.cube import Cube, Layout, read_cube, read_layout
from .readers.windows import Window


@dataclass(frozen=True)
class BandChoice:
    """The bands to read: by number, nearest to wavelengths, or interpolated at wavelengths; all if none is given.

    Attributes:
        bands: 0-based numbers.
        wavelengths: in nm; the nearest band of each is read.
        resample: in nm; spectra are interpolated there.
        tolerance: largest distance in nm from the bands of a file.
    """

    bands: Sequence[int] | None = None
    wavelengths: Sequence[float] | None = None
    resample: Sequence[float] | None = None
    tolerance: float = 10.0

    def __post_init__(self) -> None:
        if sum(choice is not None for choice in (self.bands, self.wavelengths, self.resample)) > 1:
            raise ValueError("expected only one of bands=, wavelengths= and resample=")
        for name in ("bands", "wavelengths", "resample"):
            chosen = list(getattr(self, name) or ())
            if twice := [value for value in chosen if chosen.count(value) > 1]:
                raise ValueError(f"{name} has {twice[0]:g} twice")

    @property
    def all_bands(self) -> bool:
        return self.bands is None and not self.by_wavelength

    @property
    def by_wavelength(self) -> bool:
        return self.wavelengths is not None or self.resample is not None

    def apply(self, cube: Cube) -> Cube:
        """Return the chosen bands of `cube`."""
        if self.resample is not None:
            return resample_bands(cube, self.resample, tolerance=self.tolerance)
        if self.all_bands:
            return cube
        return select_bands(cube, bands=self.bands, wavelengths=self.wavelengths, tolerance=self.tolerance)

    def labels(self, count: int) -> list[str]:
        """Return the name of each chosen band of a file with `count` bands."""
        return [f"{value:g}" for value in self.resample or self.wavelengths or self.bands or range(count)]

    def describe(self, labels: Iterable[str]) -> str:
        """Return a phrase that lists the bands named `labels`."""
        listing = ",".join(labels)
        if not self.by_wavelength:
            return f"bands {listing}"
        return f"{'spectra at' if self.resample is not None else 'wavelengths'} {listing} nm"


class ImageFiles:
    """Reads the files of one modality.

    Args:
        modality: its name.
        files: subject -> file, at least one.
        choice: the bands to read of each file.
        one_size: whether every file must have the size of the first.
        check_finite, dataset, axes: as in `read_cube`.

    Attributes:
        bands: the number of bands of a cube.
        wavelengths: `[bands]` in nm, or None.
        left_out: names of chosen bands that are nodata throughout the first file, as `leave_out_nodata` found them.

    Raises:
        ValueError: at construction and on access, a file cannot be read, lacks a band, or differs from the first in
            bands, wavelengths or size. The message names modality, subject and path.
    """

    def __init__(
        self,
        modality: str,
        files: Mapping[str, Path],
        choice: BandChoice,
        *,
        one_size: bool,
        check_finite: bool = True,
        dataset: str | None = None,
        axes: str | None = None,
    ) -> None:
        self.modality, self.files, self.choice, self.one_size = modality, files, choice, one_size
        self._check_finite, self._dataset, self._axes = check_finite, dataset, axes
        self._layouts: dict[str, Layout] = {}
        self.first = min(files)
        layout = self.layout(self.first)
        with self._named(self.first):
            chosen = choice.apply(_without_pixels(layout))
        self._count, self._size = layout.shape[0], layout.shape[1:]
        self.bands, self.wavelengths = len(chosen.values), chosen.wavelengths
        self._kept: Tensor | None = None
        self._all_needed = False
        self.left_out: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @property
    def selection(self) -> str:
        """A phrase that lists the bands of a cube."""
        labels = self.choice.labels(self._count)
        return self.choice.describe(label for label in labels if label not in self.left_out)

    def layout(self, name: str) -> Layout:
        """Return sizes and wavelengths of a file with all of its bands; each file is looked at once."""
        if name not in self._layouts:
            with self._named(name):
                self._layouts[name] = read_layout(self.files[name], dataset=self._dataset, axes=self._axes)
        return self._layouts[name]

    def read(self, name: str, window: Window | None = None) -> Cube:
        """Read the chosen bands of one file, or of a window of it, in the file's units."""
        path, first = self.files[name], self.files[self.first]
        with self._named(name):
            cube = read_cube(
                path, dataset=self._dataset, axes=self._axes, check_finite=self._check_finite, window=window
            )
            if self.choice.all_bands and len(cube.values) != self._count:
                raise ValueError(f"{path} has {len(cube.values)} bands, {first} has {self._count}")
            cube = self.choice.apply(cube)
            if self._kept is not None:
                wavelengths = None if cube.wavelengths is None else cube.wavelengths[self._kept]
                cube = Cube(cube.values[self._kept], wavelengths, cube.nodata[self._kept])
            size = cube.values.shape[1:]
            if self.one_size and window is None and tuple(size) != self._size:
                sizes = f"{path} is {size[0]} x {size[1]}, {first} is {self._size[0]} x {self._size[1]}"
                raise ValueError(f"{sizes}; give an image_size")
            if not self.choice.by_wavelength:
                self._check_wavelengths(path, cube.wavelengths)
            if self._all_needed and window is None:
                self._check_no_band_is_empty(cube)
        return cube

    def leave_out_nodata(self, windows: Iterable[Window | None]) -> None:
        """Leave out the bands that are nodata throughout `windows` of the first file, in all files.

        Raises:
            ValueError: all bands are.
        """
        seen = torch.zeros(self.bands, dtype=torch.bool)
        for window in windows:
            seen |= ~self.read(self.first, window).nodata.flatten(1).all(1)
            if seen.all():
                break
        self._all_needed = True
        if not seen.any():
            with self._named(self.first):
                raise ValueError(
                    f"{self.files[self.first]}: is nodata throughout; the first file must show which bands have data"
                )
        labels = self.choice.labels(self._count)
        self.left_out = [label for label, there in zip(labels, seen.tolist(), strict=True) if not there]
        if self.left_out:
            self._kept = seen.nonzero()[:, 0]
        self.bands = int(seen.sum())
        self.wavelengths = None if self.wavelengths is None else self.wavelengths[seen]

    def _check_wavelengths(self, path: Path, found: Tensor | None) -> None:
        first = self.files[self.first]
        if (found is None) != (self.wavelengths is None):
            has, none = (first, path) if found is None else (path, first)
            raise ValueError(f"{none} has no wavelengths, {has} has")
        if found is not None and self.wavelengths is not None:
            difference = float((found - self.wavelengths).abs().max())
            if difference > self.choice.tolerance:
                raise ValueError(f"the wavelengths of {path} and {first} differ by up to {difference:g} nm")

    def _check_no_band_is_empty(self, cube: Cube) -> None:
        empty = cube.nodata.flatten(1).all(1)
        if empty.any() and not empty.all():
            labels = [label for label in self.choice.labels(self._count) if label not in self.left_out]
            listing = [label for label, missing in zip(labels, empty.tolist(), strict=True) if missing]
            first = self.files[self.first]
            raise ValueError(f"{self.choice.describe(listing)} is nodata throughout, but not in {first}")

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Add modality, subject and path to the message of a ValueError that the block raises."""
        try:
            yield
        except ValueError as error:
            place = "" if str(self.files[name]) in str(error) else f"{self.files[name]}: "
            raise ValueError(f"modality {self.modality!r}, subject {name!r}: {place}{error}") from error


def _without_pixels(layout: Layout) -> Cube:
    """Return a cube with the bands of a file and no pixels, on which a choice of bands can be tried."""
    values = torch.empty(layout.shape[0], 0, 0)
    return Cube(values, layout.wavelengths, values.bool())

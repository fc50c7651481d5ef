"""The image files of one modality: reads the requested bands on the cube's grid, and compares files with the first."""

import multiprocessing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .bands import CHOICES, BandChoice
from .georeference import find_georeference
from .readers.arrays import Reading
from .readers.cube import Cube, Layout, read_cube, read_layout
from .readers.windows import Window
from .warp import Warp, find_warp


class ImageFiles:
    """Reads the files of one modality.

    Args:
        modality: its name.
        files: subject -> file, at least one.
        choice: the bands to read of each file.
        one_size: whether every file must have the size of the first.
        cubes: those of the subjects, onto whose grids images that lie on others are resampled by position. None: files
            are read as they are.
        check_finite: as in `read_cube`.
        reading: further arguments of `read_cube`.

    Attributes:
        bands: the number of bands of a cube.
        wavelengths: `[bands]` in nm, or None.
        choice: the bands to read, by number where intervals were given.
        left_out: names of chosen bands that are nodata throughout the first file, as `leave_out_nodata` found them.
        cut: names of the last bands, left out for a number that is a multiple of the patch's.

    Raises:
        ValueError: at construction and on access, a file cannot be read, lacks a band, or differs from the first in
            bands, wavelengths or size, or does not overlap its cube. The message names modality, subject and path.
    """

    def __init__(
        self,
        modality: str,
        files: Mapping[str, Path],
        choice: BandChoice,
        *,
        one_size: bool,
        cubes: "ImageFiles | None" = None,
        check_finite: bool = True,
        reading: Reading | None = None,
    ) -> None:
        self.modality, self.files, self.one_size = modality, files, one_size
        self._check_finite, self._reading = check_finite, reading or Reading()
        self._cubes = cubes
        self._layouts: dict[str, Layout] = {}
        self._warps: dict[str, Warp | None] = {}
        self._differences: set[str] = set()  # from the grids of cubes, of which there was a warning
        self._noted: set[str] = set()
        self.first = min(files)
        layout = self.layout(self.first)
        with self._named(self.first):
            self.choice = choice.resolved(layout.shape[0], layout.wavelengths)
            chosen = self.choice.apply(_without_pixels(layout))
        self._warn_of_notes(self.first, layout.notes)
        self._count, self._size = layout.shape[0], self.size(self.first)
        self.bands, self.wavelengths = len(chosen.values), chosen.wavelengths
        self._kept: Tensor | None = None
        self._all_needed = False
        self.left_out: list[str] = []
        self.cut: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @property
    def selection(self) -> str:
        """A phrase that lists the bands of a cube, and how many the file has if they are chosen by number."""
        absent = {*self.left_out, *self.cut}
        chosen = self.choice.describe(label for label in self.choice.labels(self._count) if label not in absent)
        return chosen if self.choice.by_wavelength else f"{chosen} of {self._count}"

    def layout(self, name: str) -> Layout:
        """Return sizes and wavelengths of a file with all of its bands; each file is looked at once."""
        if name not in self._layouts:
            with self._named(name):
                self._layouts[name] = read_layout(self.files[name], **self._reading)
        return self._layouts[name]

    def size(self, name: str) -> tuple[int, int]:
        """Return height and width of an image as `read` returns it."""
        warp = self.warp(name)
        return self.layout(name).shape[1:] if warp is None else warp.cube.size

    def warp(self, name: str, *, sizes_fit: bool = True) -> Warp | None:
        """Return how a file is resampled onto the grid of its cube, or None if it is read as it is.

        Args:
            name: of the subject.
            sizes_fit: False resamples the file although it covers the place of its cube, from now on.
        """
        if name not in self._warps or not sizes_fit:
            with self._named(name):
                self._warps[name] = self._find_warp(name, sizes_fit)
            self._warn_of_warp(name, self._warps[name])
        return self._warps[name]

    def read(self, name: str, window: Window | None = None) -> Cube:
        """Read the chosen bands of one file, or of a window of it, in the file's units.

        The window is one of the cube if the file is resampled onto its grid.
        """
        path, first, warp = self.files[name], self.files[self.first], self.warp(name)
        with self._named(name):
            read = partial(read_cube, path, check_finite=self._check_finite, **self._reading)
            cube = read(window=window) if warp is None else warp.read(lambda part: read(window=part), window)
            self._warn_of_notes(name, cube.notes)
            if self.choice.all_bands and len(cube.values) != self._count:
                hint = f"; choose bands that all have by {CHOICES}" if self.modality == "hsi" else ""
                raise ValueError(f"{path} has {len(cube.values)} bands, {first} has {self._count}{hint}")
            cube = self.choice.apply(cube)
            if self._kept is not None:
                wavelengths = None if cube.wavelengths is None else cube.wavelengths[self._kept]
                cube = Cube(cube.values[self._kept], wavelengths, cube.nodata[self._kept], cube.notes)
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

    def cut_to_multiple(self, multiple: int) -> None:
        """Leave out the last bands, so that the number of those left is a multiple of `multiple`.

        Raises:
            ValueError: there are fewer bands than `multiple`.
        """
        left = self.bands - self.bands % multiple
        if left == 0:
            raise ValueError(f"{self.bands} bands are fewer than the {multiple} of a patch; choose more by {CHOICES}")
        if left < self.bands:
            kept = torch.arange(self.bands) if self._kept is None else self._kept
            labels = self.choice.labels(self._count)
            self.cut = [labels[number] for number in kept[left:].tolist()]
            self._kept, self.bands = kept[:left], left
            self.wavelengths = None if self.wavelengths is None else self.wavelengths[:left]

    def _find_warp(self, name: str, sizes_fit: bool) -> Warp | None:
        image = None if self._cubes is None else find_georeference(self.files[name])
        if self._cubes is None or image is None or image.size != self.layout(name).shape[1:]:  # as axes= reads pages
            return None
        cube = find_georeference(self._cubes.files[name])
        if cube is None or cube.size != self._cubes.layout(name).shape[1:]:
            return None
        return find_warp(image, cube, sizes_fit=sizes_fit)

    def _warn_of_warp(self, name: str, warp: Warp | None) -> None:
        """Warn once of each way in which grids differ; not in a worker."""
        if warp is None or warp.differences in self._differences or multiprocessing.parent_process() is not None:
            return
        self._differences.add(warp.differences)
        warnings.warn(
            f"modality {self.modality!r}: {self.files[name]} is resampled by position onto the grid of its cube, as it "
            f"has {warp.differences}; others like it are not named",
            stacklevel=4,
        )

    def _warn_of_notes(self, name: str, notes: tuple[str, ...]) -> None:
        """Warn once of what the reader notes of a file, if it is not what it notes of the first; not in a worker."""
        if name in self._noted or multiprocessing.parent_process() is not None:
            return
        self._noted.add(name)
        if notes and (name == self.first or notes != self.layout(self.first).notes):
            warnings.warn(f"{self.files[name]}: {'; '.join(notes)}", stacklevel=4)

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
            absent = {*self.left_out, *self.cut}
            labels = [label for label in self.choice.labels(self._count) if label not in absent]
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

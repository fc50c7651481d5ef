"""A data set of files: one hyperspectral cube a subject, and auxiliary images of the same stem in other folders."""

import os
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .bands import CHOICES, BandChoice
from .image_files import ImageFiles
from .normalization import Normalization, listed, load_or_save, remembered, robust_percentiles
from .pairing import Modality, pair_files
from .readers.arrays import Reading
from .readers.windows import Edges, Window, tile_grid
from .sample import Sample
from .subjects import Subjects, contents
from .tiles import Position, grid_factor, scaled


class PairedFolder(Subjects):
    """Subjects in folders of images, paired by file stem.

    Args:
        hsi_dir: folder of cubes, one file (or ENVI pair) a subject, in any format of `read_cube`; or one such file.
        aux: modality -> folder of its images: "DIR" for all bands, "DIR:0" or "DIR:0,2" for some. A subject lacks the
            modality if it has no file there, or one that is nodata throughout. Where both tell where they lie, an image
            of another extent, orientation or reference system is resampled bilinearly onto the grid of its cube.
        image_size: side, or (height, width), to which images of other sizes are resized: bilinear, no antialiasing,
            corners not aligned. None: every file of a modality must have the size of the first.
        bands: 0-based numbers of the bands to read from the cubes; or text: numbers and ranges like "0-189,213", or
            intervals like "400-1340,1460-1790nm"; None for all.
        wavelengths: instead of `bands`, wavelengths in nm; the nearest band of each, within `tolerance`, is read.
        resample: instead of both, wavelengths in nm at which spectra are interpolated linearly.
        normalization: statistics, or the path of their JSON file, which is written if it does not exist yet. None:
            computed and kept in memory. Statistics that were measured with `nodata` or `scale` bring them along; others
            are refused.
        check_finite: False treats undeclared NaN and infinite values as nodata instead of raising an error.
        tolerance: in nm; also how far the wavelengths of two cubes may differ.
        dataset, axes, nodata, scale: as in `read_cube`; a mapping goes by modality ("hsi" for the cubes), anything else
            is for the cubes.
        file_wavelengths: of the bands of the cubes' files in nm, instead of those that they tell.
        band_multiple: the last bands are left out, with a warning, so that their number is a multiple of this, as of
            the bands of a model's patch.
        tile: side in pixels of the squares that cubes are cut into. Each is a subject with a name like `scene1@r0c48`,
            and only its pixels are read. The size of an auxiliary image without georeference must be an integer
            multiple or fraction of its cube's. None: whole cubes.
        overlap: pixels shared by neighbouring tiles; the last tile of a row or column shares more.
        edges: as in `tile_grid`; tiles may be smaller than others with `clip` and `cut`, which are for cubes alone.

    Attributes:
        names: the subjects, sorted; tiles row by row.
        positions, modalities, bands, wavelengths, normalization: as in `Subjects`.
        left_out: names of requested bands that are nodata throughout the first cube; no sample has them.

    Raises:
        ValueError: at construction, folders, pairs or statistics do not fit; on access, a file cannot be read, differs
            from the first in bands or size, or has nothing but nodata in a band that the first has data in. The message
            names modality, subject and path.

    Example:
        >>> import numpy as np
        >>> from pathlib import Path
        >>> from mmmae.data import PairedFolder
        >>> for folder in ("hsi", "radar"):
        ...     Path(folder).mkdir()
        >>> rng = np.random.default_rng(0)
        >>> for name in ("field", "forest"):
        ...     np.save(f"hsi/{name}.npy", rng.normal(2000, 300, (12, 48, 48)))
        >>> np.save("radar/forest.npy", rng.normal(-12, 3, (2, 24, 24)))
        >>> data = PairedFolder("hsi", {"VV": "radar:0", "VH": "radar:1"}, image_size=32)
        >>> data
        PairedFolder(hsi: 2 subjects, 12 bands, aux={'VV': 1, 'VH': 1}, image_size=(32, 32))
        >>> data[1].name, data[1].hsi.shape, sorted(data[1].aux)
        ('forest', torch.Size([1, 12, 32, 32]), ['VH', 'VV'])
        >>> data[0].aux  # the field has no radar image
        {}
    """

    def __init__(
        self,
        hsi_dir: str | os.PathLike[str],
        aux: Mapping[str, str | os.PathLike[str]] | None = None,
        *,
        image_size: int | tuple[int, int] | None = None,
        bands: Sequence[int] | str | None = None,
        wavelengths: Sequence[float] | None = None,
        resample: Sequence[float] | None = None,
        normalization: str | os.PathLike[str] | Normalization | None = None,
        check_finite: bool = True,
        tolerance: float = 10.0,
        dataset: str | Mapping[str, str] | None = None,
        axes: str | Mapping[str, str] | None = None,
        nodata: float | Mapping[str, float] | None = None,
        scale: float | Mapping[str, float] | None = None,
        file_wavelengths: Sequence[float] | None = None,
        band_multiple: int = 1,
        tile: int | None = None,
        overlap: int = 0,
        edges: Edges = "refuse",
    ) -> None:
        aux = dict(aux or {})
        if aux and edges != "refuse":
            raise ValueError(f"edges is {edges!r}, which is for cubes without auxiliary images")
        if "hsi" in aux:
            raise ValueError('"hsi" is the name of the cubes; give the auxiliary modality another')
        if isinstance(bands, str) and wavelengths is None and resample is None:
            choice = BandChoice.parse(bands, tolerance)
        else:
            choice = BandChoice(bands, wavelengths, resample, tolerance)  # type: ignore[arg-type]  # refuses several
        self.image_size, self.tile, self.overlap = _check_size(image_size), tile, overlap
        self._edges = edges
        if not (tile is None and overlap == 0) and not 0 <= overlap < (tile or 0):
            raise ValueError(f"tile is {tile}, overlap is {overlap}, expected 0 <= overlap < tile")
        given = {"dataset": dataset, "axes": axes, "nodata": nodata, "scale": scale}
        reading = read_by_modality(["hsi", *aux], **given)
        reading["hsi"]["wavelengths"] = file_wavelengths
        self._path = None
        known: Normalization | None = None
        if isinstance(normalization, Normalization):
            known = normalization
        elif normalization is not None:
            self._path = Path(normalization)
            known = Normalization.load(self._path) if self._path.exists() else None
        if known is not None:
            reading = {name: _recalled(given, known.reading.get(name, {})) for name, given in reading.items()}
        self._remembered = {modality: remembered(options) for modality, options in reading.items()}

        hsi, paired = pair_files(hsi_dir, aux)
        self.folder = hsi.folder

        def files_of(modality: str, found: Modality, chosen: BandChoice, cubes: ImageFiles | None = None) -> ImageFiles:
            return ImageFiles(
                modality,
                found.files,
                chosen,
                one_size=self.image_size is None and tile is None,
                cubes=cubes,
                check_finite=check_finite,
                reading=reading[modality],
            )

        self._hsi = files_of("hsi", hsi, choice)
        self._aux = {
            name: files_of(name, found, BandChoice(found.bands, tolerance=tolerance), self._hsi)
            for name, found in paired.items()
        }
        scenes = sorted(hsi.files)
        self.positions = [] if tile is None else [place for scene in scenes for place in self._tiles_of(scene, overlap)]
        self.names = scenes if tile is None else [position.name for position in self.positions]
        self._factors = {} if tile is None else {name: self._grid_factors(files) for name, files in self._aux.items()}
        first = [None] if tile is None else [place.window for place in self._tiles_of(self._hsi.first, 0)]
        self._hsi.leave_out_nodata(first)
        self.left_out = self._hsi.left_out
        if self.left_out:
            listing = choice.describe(self.left_out)
            warnings.warn(
                f"{hsi.files[self._hsi.first]} is nodata throughout in {listing}: left out of all cubes", stacklevel=2
            )
        bands_there = self._hsi.bands
        self._hsi.cut_to_multiple(band_multiple)
        if self._hsi.cut:
            warnings.warn(
                f"{bands_there} bands are no multiple of the patch's {band_multiple}: left out "
                f"{choice.describe(self._hsi.cut)}; choose others by {CHOICES}",
                stacklevel=2,
            )
        self.bands, self.wavelengths = self._hsi.bands, self._hsi.wavelengths
        self.modalities = {name: files.bands for name, files in self._aux.items()}

        if known is not None:
            self.normalization = self._fitting(known, str(self._path or "normalization"))
        elif self._path is not None and not self._path.parent.is_dir():
            raise ValueError(f"normalization {self._path}: the folder {self._path.parent} does not exist")

    @cached_property
    def normalization(self) -> Normalization:
        """The statistics; the first access reads every file once if they do not exist yet.

        Access it before a DataLoader starts its workers: without a path each worker would compute the same numbers for
        itself. With a path, the processes of one machine wait for the one that computes them.
        """
        if self._path is None:
            return self._compute()
        return self._fitting(load_or_save(self._path, self._compute), str(self._path))

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        scene, window = self.positions[index] if self.positions else (name, None)
        hsi, nodata = self._image(self._hsi, scene, window)
        valid = self._resize((~nodata.any(0)).float()[None])[0] >= 0.5
        aux: dict[str, Tensor] = {}
        for modality, files in self._aux.items():
            if scene in files:
                image, missing = self._image(files, scene, self._on_grid(modality, scene, window))
                if not missing.all():
                    aux[modality] = self._resize(image)
        return Sample(name, self._resize(hsi).masked_fill(~valid, 0.0)[None], aux, valid)

    def __repr__(self) -> str:
        size = f", image_size={self.image_size}" if self.image_size else ""
        tiles = f", tile={self.tile}, overlap={self.overlap}" if self.tile else ""
        left_out = f", left_out={self.left_out}" if self.left_out else ""
        counts = contents(self, "tile" if self.tile else "subject")
        return f"PairedFolder({self.folder}: {counts}{size}{tiles}{left_out})"

    def files(self, index: int) -> dict[str, Path]:
        """Return the files that a subject is read from: modality -> path, "hsi" for the cube."""
        scene = self.positions[index].scene if self.positions else self.names[index]
        readers = {"hsi": self._hsi, **self._aux}
        return {modality: reader.files[scene] for modality, reader in readers.items() if scene in reader}

    def cube_size(self, index: int) -> tuple[int, int]:
        """Return height and width of the cube, or scene, that a subject is read from."""
        _, height, width = self._hsi.layout(self.positions[index].scene if self.positions else self.names[index]).shape
        return height, width

    def _tiles_of(self, scene: str, overlap: int) -> list[Position]:
        assert self.tile is not None
        height, width = self._hsi.layout(scene).shape[1:]
        try:
            return [Position(scene, window) for window in tile_grid(height, width, self.tile, overlap, self._edges)]
        except ValueError as error:
            raise ValueError(f"modality 'hsi', subject {scene!r}: {self._hsi.files[scene]}: {error}") from error

    def _grid_factors(self, files: ImageFiles) -> dict[str, Fraction]:
        """Return scene -> length of a cube's pixel in pixels of the auxiliary image; 1 where it is resampled."""
        assert self.tile is not None
        factors: dict[str, Fraction] = {}
        for scene, path in files.files.items():
            place = f"modality {files.modality!r}, subject {scene!r}: {path}"
            try:
                factors[scene] = grid_factor(self._hsi.size(scene), files.size(scene), self.tile, self.overlap)
            except ValueError as error:
                if files.warp(scene, sizes_fit=False) is None:
                    raise ValueError(f"{place}: {error}") from error
                factors[scene] = Fraction(1)
            known = next(iter(factors.values()))
            if self.image_size is None and factors[scene] != known:
                raise ValueError(
                    f"{place} has {factors[scene]} pixels a pixel of its cube, others have {known}; give an image_size"
                )
        return factors

    def _on_grid(self, modality: str, scene: str, window: Window | None) -> Window | None:
        return None if window is None else scaled(window, self._factors[modality][scene])

    def _image(self, files: ImageFiles, scene: str, window: Window | None) -> tuple[Tensor, Tensor]:
        """Read normalised values `[C, H, W]`, 0 where nodata, and nodata `[C, H, W]`."""
        cube = files.read(scene, window)
        values = self.normalization.apply(files.modality, cube.values).masked_fill_(cube.nodata, 0.0)
        if not torch.isfinite(values).all():
            place = f"modality {files.modality!r}, subject {scene!r}: {files.files[scene]}"
            raise ValueError(f"{place}: values are not finite after normalisation")
        return values, cube.nodata

    def _resize(self, image: Tensor) -> Tensor:
        """Resize an image `[C, H, W]` to `image_size`."""
        if self.image_size is None or tuple(image.shape[1:]) == self.image_size:
            return image
        return F.interpolate(image[None], self.image_size, mode="bilinear", align_corners=False, antialias=False)[0]

    def _compute(self) -> Normalization:
        percentiles, selection = {}, {}
        for modality, files in {"hsi": self._hsi, **self._aux}.items():
            parts: list[tuple[str, Window | None]] = [(scene, None) for scene in sorted(files.files)]
            if self.tile is not None:
                parts = [
                    (scene, window if files is self._hsi else self._on_grid(modality, scene, window))
                    for scene in sorted(files.files)
                    for _, window in self._tiles_of(scene, 0)
                ]
            try:
                percentiles[modality] = robust_percentiles((files.read(*part) for part in parts), len(parts))
            except ValueError as error:
                place = "" if "modality" in str(error) else f"modality {modality!r}: "
                raise ValueError(f"{place}{error}") from error
            selection[modality] = files.selection
        return Normalization(percentiles, selection, self._remembered)

    def _fitting(self, normalization: Normalization, source: str) -> Normalization:
        for modality, files in {"hsi": self._hsi, **self._aux}.items():
            known = normalization.percentiles.get(modality)
            if known is None:
                raise ValueError(f"{source} has no statistics of modality {modality!r}")
            if len(known) != files.bands:
                hint = f"; choose bands by {CHOICES}" if modality == "hsi" else ""
                raise ValueError(
                    f"{source} has {len(known)} bands of modality {modality!r}, the files give {files.bands}{hint}"
                )
            selection = normalization.selection.get(modality, "")
            if selection and selection.partition(" of ")[0] != files.selection.partition(" of ")[0]:
                raise ValueError(
                    f"{source} was measured on other bands of modality {modality!r}: {selection}, "
                    f"expected {files.selection}"
                )
            measured, given = normalization.reading.get(modality), self._remembered[modality]
            if measured is not None and measured != given:
                raise ValueError(
                    f"{source} was measured with {listed(measured)} of modality {modality!r}, the files are read with "
                    f"{listed(given)}; give the same, or measure others"
                )
        return normalization


def _check_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size is {image_size}, expected one or two positive numbers")
    return height, width


def _recalled(given: Reading, known: Mapping[str, str]) -> Reading:
    """Return the arguments of `read_cube` that are given, and those that statistics know where none are."""
    chosen = {option: value for option, value in given.items() if value is not None}
    return cast(Reading, {**{option: float(text) for option, text in known.items()}, **chosen})


def read_by_modality(modalities: Sequence[str], **options: Any) -> dict[str, Reading]:
    """Return for each modality the arguments of `read_cube`, of which each option is one for the cubes or a mapping.

    Raises:
        ValueError: an option names an unknown modality.
    """
    reading: dict[str, Any] = {modality: {} for modality in modalities}
    for option, given in options.items():
        by_modality = dict(given) if isinstance(given, Mapping) else {} if given is None else {"hsi": given}
        if unknown := set(by_modality) - set(modalities):
            raise ValueError(f"{option}= names {sorted(unknown)}; the modalities are {list(modalities)}")
        for modality, value in by_modality.items():
            reading[modality][option] = value
    return reading

"""A data set of files: one hyperspectral cube a subject, auxiliary images of the same stem in folders beside."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .cube import Cube, read_cube, select_bands
from .normalization import Normalization, robust_percentiles
from .pairing import pair_files
from .sample import Sample


class PairedFolder(Dataset[Sample]):
    """Subjects in folders, paired by file stem; item i is the `Sample` of `names[i]`.

    Args:
        hsi_dir: folder of cubes, one file (or ENVI pair) a subject, in any format of `read_cube`.
        aux: modality -> folder of its images, "DIR" for all bands, "DIR:0" or "DIR:0,2" for some. A subject without a
            file, or whose file is nodata throughout, lacks the modality.
        image_size: side, or (height, width), to which images of another size are resized: bilinear, no antialias,
            corners not aligned. None: every file of a modality must have the size of the first.
        bands: 0-based bands of the cubes to take; None for all.
        wavelengths: instead of `bands`, the nm to take, each by the nearest band within `tolerance`.
        normalization: statistics, or the path of their JSON file, which is written if it does not exist yet. None:
            computed and kept in memory.
        check_finite: False counts undeclared NaN and infinite values as nodata instead of refusing them.
        tolerance: nm; also how far the wavelengths of two cubes may differ.
        dataset, axes: for `read_cube`: a string is for the cubes, a mapping names modalities ("hsi" for the cubes).

    Attributes:
        names: the subjects, sorted.
        modalities: auxiliary modality -> channels.
        bands: T, the bands of a sample.
        wavelengths: `[T]` nm, or None.

    Raises:
        ValueError: at construction, a folder, a pairing or statistics that do not fit; on access, a file that cannot be
            read or differs from the first one in bands or size. Names modality, subject and path.
    """

    def __init__(
        self,
        hsi_dir: str | os.PathLike[str],
        aux: Mapping[str, str | os.PathLike[str]] | None = None,
        *,
        image_size: int | tuple[int, int] | None = None,
        bands: Sequence[int] | None = None,
        wavelengths: Sequence[float] | None = None,
        normalization: str | os.PathLike[str] | Normalization | None = None,
        check_finite: bool = True,
        tolerance: float = 10.0,
        dataset: str | Mapping[str, str] | None = None,
        axes: str | Mapping[str, str] | None = None,
    ) -> None:
        aux = dict(aux or {})
        if "hsi" in aux:
            raise ValueError('"hsi" is the name of the cubes; give the auxiliary modality another')
        if bands is not None and wavelengths is not None:
            raise ValueError("expected bands= or wavelengths=, not both")
        self.image_size = _check_size(image_size)
        self._options = {
            "dataset": {"hsi": dataset} if isinstance(dataset, str) else dict(dataset or {}),
            "axes": {"hsi": axes} if isinstance(axes, str) else dict(axes or {}),
        }
        for option, by_name in self._options.items():
            if unknown := set(by_name) - {"hsi", *aux}:
                raise ValueError(f"{option}= names {sorted(unknown)}; the modalities are {['hsi', *aux]}")
        self._wanted_bands = None if bands is None else tuple(bands)
        self._wanted_wavelengths = None if wavelengths is None else tuple(float(value) for value in wavelengths)
        self._tolerance, self._check_finite = tolerance, check_finite

        self._hsi, self._aux = pair_files(hsi_dir, aux)
        self.names = sorted(self._hsi.files)
        self._first: dict[str, tuple[Path, torch.Size, Tensor | None]] = {}
        for modality in ("hsi", *aux):
            files = self._files(modality)
            name = min(files)
            cube = self._read(modality, name)
            self._first[modality] = (files[name], cube.values.shape, cube.wavelengths)
        self.bands = self._first["hsi"][1][0]
        self.wavelengths = self._first["hsi"][2]
        self.modalities = {modality: self._first[modality][1][0] for modality in aux}

        self._normalization, self._path = None, None
        if isinstance(normalization, Normalization):
            self._normalization = self._fitting(normalization, "normalization")
        elif normalization is not None:
            self._path = Path(normalization)
            if self._path.exists():
                self._normalization = self._fitting(Normalization.load(self._path), str(self._path))
            elif not self._path.parent.is_dir():
                raise ValueError(f"normalization {self._path}: the folder {self._path.parent} does not exist")

    @property
    def normalization(self) -> Normalization:
        """The statistics; the first access reads every file once if they do not exist yet.

        Access it before a DataLoader starts its workers: without a path each worker would compute the same numbers for
        itself. With a path, processes of one machine wait for the one that computes.
        """
        if self._normalization is None and self._path is None:
            self._normalization = self._compute()
        elif self._normalization is None and self._path is not None:
            with _one_process_at_a_time(self._path.parent):
                if not self._path.exists():
                    self._compute().save(self._path)
            self._normalization = self._fitting(Normalization.load(self._path), str(self._path))
        assert self._normalization is not None
        return self._normalization

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        hsi, nodata = self._image("hsi", name)
        valid = self._resize((~nodata.any(0)).float()[None])[0] >= 0.5
        aux: dict[str, Tensor] = {}
        for modality, paired in self._aux.items():
            if name in paired.files:
                image, missing = self._image(modality, name)
                if not missing.all():
                    aux[modality] = self._resize(image)
        return Sample(name, self._resize(hsi).masked_fill(~valid, 0.0)[None], aux, valid)

    def __repr__(self) -> str:
        size = f", image_size={self.image_size}" if self.image_size else ""
        return f"PairedFolder({self._hsi.folder}: {len(self)} subjects, {self.bands} bands, {self.modalities}{size})"

    def _files(self, modality: str) -> dict[str, Path]:
        return self._hsi.files if modality == "hsi" else self._aux[modality].files

    def _read(self, modality: str, name: str) -> Cube:
        """The chosen bands of one file, in its own units and size; checked against the modality's first file."""
        path = self._files(modality)[name]
        try:
            dataset, axes = (self._options[option].get(modality) for option in ("dataset", "axes"))
            cube = read_cube(path, dataset=dataset, axes=axes, check_finite=self._check_finite)
            bands = self._wanted_bands if modality == "hsi" else self._aux[modality].bands
            wavelengths = self._wanted_wavelengths if modality == "hsi" else None
            if bands is not None or wavelengths is not None:
                cube = select_bands(cube, bands=bands, wavelengths=wavelengths, tolerance=self._tolerance)
        except ValueError as error:
            place = "" if str(path) in str(error) else f"{path}: "
            raise ValueError(f"modality {modality!r}, subject {name!r}: {place}{error}") from error
        if modality in self._first:
            self._check_like_first(modality, name, cube)
        return cube

    def _check_like_first(self, modality: str, name: str, cube: Cube) -> None:
        path, (first_path, shape, wavelengths) = self._files(modality)[name], self._first[modality]
        problem = None
        if cube.values.shape[0] != shape[0]:
            problem = f"{path} has {cube.values.shape[0]} bands, {first_path} has {shape[0]}"
        elif self.image_size is None and cube.values.shape[1:] != shape[1:]:
            problem = f"{path} is {_by(cube.values.shape)}, {first_path} is {_by(shape)}; give an image_size"
        elif self._wanted_wavelengths is None and cube.wavelengths is not None and wavelengths is not None:
            difference = float((cube.wavelengths - wavelengths).abs().max())
            if difference > self._tolerance:
                problem = f"the wavelengths of {path} and {first_path} differ by up to {difference:g} nm"
        if problem is not None:
            raise ValueError(f"modality {modality!r}, subject {name!r}: {problem}")

    def _image(self, modality: str, name: str) -> tuple[Tensor, Tensor]:
        """Normalised values `[C, H, W]`, 0 where nodata, and nodata `[C, H, W]`."""
        cube = self._read(modality, name)
        values = self.normalization.apply(modality, cube.values).masked_fill_(cube.nodata, 0.0)
        if not torch.isfinite(values).all():
            path = self._files(modality)[name]
            raise ValueError(f"modality {modality!r}, subject {name!r}: {path}: not finite after normalisation")
        return values, cube.nodata

    def _resize(self, image: Tensor) -> Tensor:
        """`[C, H, W]` at the asked size."""
        if self.image_size is None or tuple(image.shape[1:]) == self.image_size:
            return image
        return F.interpolate(image[None], self.image_size, mode="bilinear", align_corners=False, antialias=False)[0]

    def _compute(self) -> Normalization:
        percentiles = {}
        for modality in ("hsi", *self.modalities):
            names = sorted(self._files(modality))
            try:
                percentiles[modality] = robust_percentiles((self._read(modality, name) for name in names), len(names))
            except ValueError as error:
                place = "" if "modality" in str(error) else f"modality {modality!r}: "
                raise ValueError(f"{place}{error}") from error
        return Normalization(percentiles, {modality: self._selection(modality) for modality in percentiles})

    def _selection(self, modality: str) -> str:
        if modality == "hsi" and self._wanted_wavelengths is not None:
            return f"wavelengths {','.join(f'{value:g}' for value in self._wanted_wavelengths)} nm"
        bands = self._wanted_bands if modality == "hsi" else self._aux[modality].bands
        return f"bands {','.join(map(str, bands or range(self._first[modality][1][0])))}"

    def _fitting(self, normalization: Normalization, source: str) -> Normalization:
        for modality, channels in {"hsi": self.bands, **self.modalities}.items():
            known = normalization.percentiles.get(modality)
            if known is None:
                raise ValueError(f"{source} has no statistics of modality {modality!r}")
            if len(known) != channels:
                raise ValueError(f"{source} has {len(known)} bands of modality {modality!r}, the files give {channels}")
            selection = normalization.selection.get(modality, "")
            if selection and selection != self._selection(modality):
                raise ValueError(
                    f"{source} is of other bands of modality {modality!r}: {selection}, not {self._selection(modality)}"
                )
        return normalization


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on a folder where the system has such locks; it ends with the process at the latest."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders: then each process computes for itself
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size is {image_size}; expected one or two positive numbers")
    return height, width


def _by(shape: torch.Size) -> str:
    return f"{shape[1]} x {shape[2]}"

"""A data set of generated retina-like subjects, for runs and tests without data."""

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from ..data.normalization import Normalization, robust_percentiles
from ..data.readers.cube import Cube
from ..data.sample import Sample
from ..data.subjects import Subjects
from .retina import MODALITIES, pigments, render

REFERENCE_SUBJECTS, REFERENCE_SIZE = 12, (96, 96)
MISSING_STREAM = 9


class Phantom(Subjects):
    """Generated subjects, no measurements: hyperspectral images of a fundus, and auxiliary images of the same eye.

    Smooth maps of melanin, blood, macular pigment (xanthophyll) and lipofuscin, a vessel tree, an optic disc and a
    fovea absorb light by the Beer-Lambert law, `R = R0 exp(-2 sum_p c_p e_p(wavelength))`, with Gaussian mixtures in
    place of measured spectra. The infrared (820 nm), autofluorescence (488 nm) and thickness images are derived from
    the same maps, each with its own blur, noise and shift of at most 1.5 % of the image. Item i depends only on seed, i
    and the other arguments. `image_size` changes the noise of a scene, but not the scene.

    Args:
        length: number of subjects.
        image_size: side, or (height, width).
        bands: number of bands T, whose wavelengths are evenly spaced from 450 to 900 nm.
        aux: the modalities, some of "ir", "af" and "thickness".
        seed: of the data set.
        missing: probability that an image is missing, for each subject and modality.

    Attributes:
        names, modalities, bands, wavelengths: as in `PairedFolder`. Values are normalised as there, with the statistics
            of 12 fixed subjects; outside the disc of the fundus they are 0 and not `valid`.
    """

    def __init__(
        self,
        length: int = 64,
        image_size: int | tuple[int, int] = 224,
        bands: int = 12,
        aux: Sequence[str] = MODALITIES,
        seed: int = 0,
        missing: float = 0.15,
    ) -> None:
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        unknown = [name for name in aux if name not in MODALITIES]
        if unknown:
            raise ValueError(f"aux has unknown modalities {unknown}, expected some of {list(MODALITIES)}")
        if length < 0 or min(*self.image_size, bands) < 1 or seed < 0 or not 0 <= missing <= 1:
            raise ValueError(
                f"length is {length}, image_size {image_size}, bands {bands}, seed {seed}, missing {missing}; expected "
                "length and seed >= 0, image_size and bands >= 1, and missing in [0, 1]"
            )
        self.length, self.bands, self.seed, self.missing = length, bands, seed, missing
        self.modalities = dict.fromkeys(aux, 1)
        self.wavelengths: Tensor = torch.linspace(450, 900, bands)
        self.names = [f"phantom-{seed}-{index:05d}" for index in range(length)]

    @cached_property
    def normalization(self) -> Normalization:
        """The statistics of the twelve fixed subjects, in reflectance and the images' own units."""
        return _statistics(tuple(self.wavelengths.tolist()))

    def __getitem__(self, index: int) -> Sample:
        index = self._checked(index)
        aux = [name for name in self.modalities if name in images_of(self.seed, index, self.missing)]
        images = render(self.seed, index, self.image_size, self.wavelengths.tolist(), aux)
        normalized = {
            name: self.normalization.apply(name, torch.from_numpy(image)).masked_fill_(torch.from_numpy(~field), 0.0)
            for name, (image, field) in images.items()
        }
        valid = torch.from_numpy(images["hsi"][1])
        return Sample(self.names[index], normalized["hsi"][None], {name: normalized[name] for name in aux}, valid)

    def pigments(self, index: int) -> dict[str, Tensor]:
        """Return the amounts of pigment that a subject was generated with, `[H, W]` by name.

        The names are "melanin", "xanthophyll" (macular pigment), "lipofuscin", and "artery" and "vein" for blood with
        and without oxygen; an amount is the `c_p` of the law above. The maps go on outside the field of view.
        """
        found = pigments(self.seed, self._checked(index), self.image_size)
        return {name: torch.from_numpy(amount) for name, amount in found.items()}

    def _checked(self, index: int) -> int:
        """Return the index, counted from the start; raise IndexError if there is no such subject."""
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} subjects")
        return index % self.length

    def __repr__(self) -> str:
        return (
            f"Phantom({self.length} generated subjects, image_size={self.image_size}, bands={self.bands}, "
            f"aux={list(self.modalities)}, seed={self.seed}, missing={self.missing})"
        )


def images_of(seed: int, index: int, missing: float) -> set[str]:
    """Return the modalities that a subject has if each of them is missing with probability `missing`."""
    chance = np.random.default_rng([seed, index, MISSING_STREAM]).random(len(MODALITIES))
    return {name for name, value in zip(MODALITIES, chance, strict=True) if value >= missing}


@lru_cache(maxsize=8)
def _statistics(wavelengths: tuple[float, ...]) -> Normalization:
    subjects = [render(0, index, REFERENCE_SIZE, wavelengths, MODALITIES) for index in range(REFERENCE_SUBJECTS)]
    percentiles = {}
    for name in ("hsi", *MODALITIES):
        cubes = []
        for subject in subjects:
            image, field = (torch.from_numpy(array) for array in subject[name])
            cubes.append(Cube(image, None, ~field.expand(image.shape)))
        percentiles[name] = robust_percentiles(cubes, len(cubes))
    return Normalization(percentiles)

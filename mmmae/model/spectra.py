"""Spectra whose directions have about the same variance, and linear maps of their means around each pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDES = (1, 3, 7)  # of the squares around a pixel whose mean spectra are read, unless others are given
FLOOR = 1e-2  # added to the variances before they are made equal, as a share of their mean


class Spectra(nn.Module):
    """The spectra in two forms, the bands and each spectrum standardised, together made uncorrelated.

    A standardised spectrum is free of how bright its pixel is. Bands rise and fall together, and what tells similar
    classes apart is a small part of their variance. `fit` measures the mean and the covariance of both forms; then
    `(covariance + floor) ** -0.5` gives all directions about the same variance, so that a linear classifier learns the
    small differences in as few steps as the large ones. Before `fit`, the forms are returned as they are.

    Args:
        bands: number of bands, counted over all channels.

    Attributes:
        channels: number of channels of the result.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.channels = 2 * bands
        self.register_buffer("mean", torch.zeros(self.channels))
        self.register_buffer("whitening", torch.eye(self.channels))

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor]) -> None:
        """Measure mean and covariance over images `[B, bands, H, W]`, without pixels of zeros, which have no data."""
        count, sums = 0, torch.zeros(self.channels, dtype=torch.float64)
        products = torch.zeros(self.channels, self.channels, dtype=torch.float64)
        for image in images:
            known = image.any(1) & image.isfinite().all(1)
            pixels = self.forms(image.float()).movedim(1, -1)[known].double().cpu()
            count, sums, products = count + len(pixels), sums + pixels.sum(0), products + pixels.T @ pixels
        mean = sums / max(1, count)
        variances, directions = torch.linalg.eigh(products / max(1, count) - mean.outer(mean))
        if variances.mean() > 1e-6:  # normalised bands vary by about 1
            raised = variances.clamp(min=0) + FLOOR * variances.mean()
            self.mean.copy_(mean)
            self.whitening.copy_((directions * raised.rsqrt()) @ directions.T)

    def forms(self, bands: Tensor) -> Tensor:
        """Return bands and standardised spectra, `[B, channels, H, W]`, of the bands `[B, bands, H, W]`."""
        centred = bands - bands.mean(1, keepdim=True)
        return torch.cat([bands, centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()], dim=1)

    def forward(self, bands: Tensor) -> Tensor:
        """Return the spectra `[B, channels, H, W]` of the bands `[B, bands, H, W]`."""
        return F.conv2d(self.forms(bands) - self.mean[:, None, None], self.whitening[:, :, None, None])


class MeansLinear(nn.Conv2d):
    """A linear map of the means of an image over squares around each pixel, summed over the sides of the squares.

    A mean over s x s pixels is multiplied by s, so that noise has the same size in all of them. Averages and linear
    maps commute: the results of the maps are averaged, which have fewer channels than the image.

    Args:
        before, after: numbers of channels of the image and of the result.
        sides: of the squares in pixels, odd; 1 is the pixel itself.
    """

    def __init__(self, before: int, after: int, sides: Sequence[int] = SIDES) -> None:
        super().__init__(before, len(sides) * after, 1)
        self.sides = tuple(sides)

    def forward(self, image: Tensor) -> Tensor:
        """Return `[B, after, H, W]`; at the borders, means are of the pixels inside."""
        maps = super().forward(image).chunk(len(self.sides), dim=1)
        first, *others = (_scaled_means(part, side) for side, part in zip(self.sides, maps, strict=True))
        return sum(others, first)


def _scaled_means(image: Tensor, side: int) -> Tensor:
    """Return `side` times the means over squares around each pixel, by products for rows and for columns."""
    if side == 1:
        return image
    rows, columns = (_neighbours(length, side, image) for length in image.shape[-2:])
    return side * (rows @ (image @ columns.T))


def _neighbours(length: int, side: int, like: Tensor) -> Tensor:
    """Return the matrix `[length, length]` that averages up to `side` neighbours of each of `length` values."""
    places = torch.arange(length, device=like.device)
    near = ((places[:, None] - places).abs() <= side // 2).to(like.dtype)
    return near / near.sum(1, keepdim=True)

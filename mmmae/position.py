"""Learned separable position embeddings on grids other than the one they were learned on."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F


def position_table(spatial: Tensor, spectral: Tensor) -> Tensor:
    """One row a token, `[t*h*w, D]`, from `spatial [1, h*w, D]` and `spectral [1, t, D]`."""
    return (spectral[0, :, None] + spatial[0, None, :]).flatten(0, 1)


def resize_spatial(spatial: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[1, n*n, D]` of a square grid to `[1, h*w, D]` by bicubic interpolation, the usual way for ViTs.

    With antialias the kernel is Keys' with a = -0.5, which keeps straight ramps straight; PyTorch's other one does not.
    """
    side = math.isqrt(spatial.shape[1])
    if (side, side) == grid:
        return spatial
    image = spatial.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=grid, mode="bicubic", align_corners=False, antialias=True)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)


def resize_spectral(spectral: Tensor, groups: int) -> Tensor:
    """`[1, t, D]` to `[1, groups, D]` by linear interpolation along the bands."""
    if spectral.shape[1] == groups:
        return spectral
    return F.interpolate(spectral.transpose(1, 2), size=groups, mode="linear", align_corners=False).transpose(1, 2)

"""Learned separable position embeddings on grids other than the one they were learned on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import MMMAEConfig


def position_table(spatial: Tensor, spectral: Tensor) -> Tensor:
    """One row a token, `[t*h*w, D]`, from `spatial [1, h*w, D]` and `spectral [1, t, D]`."""
    return (spectral[0, :, None] + spatial[0, None, :]).flatten(0, 1)


def resize_positions(weights: dict[str, Tensor], old: MMMAEConfig, new: MMMAEConfig) -> dict[str, Tensor]:
    """The position embeddings among `weights` that another grid changes, on the grid of `new`.

    Args:
        weights: of a model or encoder of the config `old`.

    Raises:
        ValueError: an embedding has not the size of `old`'s grid.
    """
    (old_groups, *old_plane), (groups, *plane) = old.grid, new.grid
    resized = {}
    for name, weight in weights.items():
        if name.endswith("pos_embed_spatial"):
            _check_rows(name, weight, old_plane[0] * old_plane[1])
            if plane != old_plane:
                resized[name] = resize_spatial(weight, (old_plane[0], old_plane[1]), (plane[0], plane[1]))
        elif name.endswith("pos_embed_spectral"):
            _check_rows(name, weight, old_groups)
            if groups != old_groups:
                resized[name] = resize_spectral(weight, groups)
    return resized


def resize_spatial(spatial: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """`[1, h*w, D]` of the grid `old` to that of `new` by bicubic interpolation, the usual way for ViTs.

    With antialias the kernel is Keys' with a = -0.5, which keeps straight ramps straight; PyTorch's other one does not.
    """
    image = spatial.reshape(1, *old, -1).permute(0, 3, 1, 2).to(torch.float32)
    resized = F.interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=True)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(spatial.dtype)


def resize_spectral(spectral: Tensor, groups: int) -> Tensor:
    """`[1, t, D]` to `[1, groups, D]` by linear interpolation along the bands."""
    bands = spectral.transpose(1, 2).to(torch.float32)
    return F.interpolate(bands, size=groups, mode="linear", align_corners=False).transpose(1, 2).to(spectral.dtype)


def _check_rows(name: str, weight: Tensor, rows: int) -> None:
    if weight.dim() != 3 or weight.shape[1] != rows:
        raise ValueError(f"{name} has shape {list(weight.shape)}, expected is [1, {rows}, D] by its config")

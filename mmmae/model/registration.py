"""Spatial registration: every image of a subject on one pixel grid."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def register(image: Tensor, size: int) -> Tensor:
    """Resize `[..., H, W]` bilinearly to `[..., size, size]`; no work when it fits already.

    Pixel centres are aligned (align_corners off) and shrinking does not filter (antialias off).
    """
    if image.shape[-2:] == (size, size):
        return image
    planes = image.reshape(1, -1, *image.shape[-2:])
    resized = F.interpolate(planes, size=(size, size), mode="bilinear", align_corners=False)
    return resized.reshape(*image.shape[:-2], size, size)

"""Resizing of images to the model's pixel grid, which registers all images of a subject."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize(image: Tensor, size: int) -> Tensor:
    """Resize `[..., H, W]` bilinearly to `[..., size, size]`; an image of that size is returned as it is.

    Pixel centres are aligned (align_corners off) and shrinking does not filter (antialias off).
    """
    if image.shape[-2:] == (size, size):
        return image
    planes = image.reshape(1, -1, *image.shape[-2:])
    resized = F.interpolate(planes, size=(size, size), mode="bilinear", align_corners=False)
    return resized.reshape(*image.shape[:-2], size, size)

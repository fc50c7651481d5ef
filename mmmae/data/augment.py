"""Random crops and flips, applied alike to all images of a subject, whatever their sizes."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .sample import Sample


def augment(
    sample: Sample,
    generator: np.random.Generator,
    *,
    crop: tuple[float, float] | None = (0.5, 1.0),
    flip: bool = True,
) -> Sample:
    """Crop, flip and transpose all images of a subject alike; their sizes do not change.

    The crop has the aspect ratio of the image and is resized to it bilinearly. Its place is a share of the scene, not a
    number of pixels, so that images of different sizes stay aligned exactly. A resampled pixel is valid if at least
    half of it comes from valid pixels; elsewhere the cube is 0. Six numbers are drawn whatever the options are.

    Args:
        sample: not modified.
        generator: the only source of randomness: the same state gives the same result.
        crop: smallest and largest share of the area to keep; None keeps all.
        flip: mirror horizontally, mirror vertically and, if every image is square, transpose, each with probability
            one half.

    Raises:
        ValueError: the shares are not in ascending order, above 0 and at most 1.
    """
    if crop is not None and not 0 < crop[0] <= crop[1] <= 1:
        raise ValueError(f"crop is {crop}, expected two shares of the area in ascending order, above 0 and at most 1")
    area, top, left, *coins = generator.random(6).tolist()
    images = {**sample.aux, "hsi": sample.hsi[0], "valid": sample.valid[None].float()}
    if crop is not None:
        side = math.sqrt(crop[0] + area * (crop[1] - crop[0]))
        place = (top * (1 - side), left * (1 - side), side)
        images = {name: _crop(image, *place) for name, image in images.items()}
    if flip:
        mirrored = [axis for axis, coin in zip((1, 2), coins, strict=False) if coin < 0.5]
        transposed = coins[2] < 0.5 and all(image.shape[1] == image.shape[2] for image in images.values())
        for name, image in images.items():
            image = image.flip(mirrored)
            images[name] = (image.transpose(1, 2) if transposed else image).contiguous()
    valid = images.pop("valid")[0] >= 0.5
    hsi = images.pop("hsi").masked_fill(~valid, 0.0)[None]
    return Sample(sample.name, hsi, images, valid)


def _crop(image: Tensor, top: float, left: float, side: float) -> Tensor:
    """Return a part of `image` `[C, H, W]` at the size of `image`; its place is in shares of height and width."""
    if side == 1:
        return image
    moved = torch.tensor([[[side, 0.0, 2 * left + side - 1], [0.0, side, 2 * top + side - 1]]])
    grid = F.affine_grid(moved, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]

"""Random crops and flips that are the same over all images of a subject, whatever their sizes."""

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
    """Crop, flip and transpose all images of a subject alike; sizes stay as they are.

    The crop has the shape of the image and is resized to it bilinearly. It is a place in the scene, not a count of
    pixels, so that images of other sizes keep their alignment exactly. A pixel is valid if at least half of what it is
    made of is, and the cube is 0 where it is not. The generator gives six numbers whatever the options are.

    Args:
        sample: is left as it is.
        generator: the only source of chance: from the same state comes the same sample.
        crop: smallest and largest share of the area to keep; None keeps all.
        flip: mirror left and right, and up and down, each half of the time; and, where every image is square, exchange
            rows and columns as often.

    Raises:
        ValueError: the shares are not in order, not above 0 or above 1.
    """
    if crop is not None and not 0 < crop[0] <= crop[1] <= 1:
        raise ValueError(f"crop is {crop}; expected two shares of the area in ascending order, above 0 and at most 1")
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
    """The square `side` of `image` `[C, H, W]`, in shares of its height and width, at the size of `image`."""
    if side == 1:
        return image
    moved = torch.tensor([[[side, 0.0, 2 * left + side - 1], [0.0, side, 2 * top + side - 1]]])
    grid = F.affine_grid(moved, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]

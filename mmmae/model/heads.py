"""Segmentation: a class for each pixel, from the maps of a few blocks and from the bands themselves."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import MMMAEConfig
from .encoder import HSIEncoder
from .resize import resize


class SegmentationModel(nn.Module):
    """An encoder with a light upsampling head that classifies each pixel.

    Args:
        encoder: its parameters are the model's own `encoder.*`.
        classes: number of classes.
        freeze_encoder: train the head alone, without gradients through the encoder.
        width: channels of the head.
        blocks: numbers of the blocks whose maps the head reads; None takes up to four, spread over the depth.

    Raises:
        ValueError: an argument is not allowed.
    """

    def __init__(
        self,
        encoder: HSIEncoder,
        classes: int,
        *,
        freeze_encoder: bool = False,
        width: int = 64,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        depth = encoder.config.depth
        self.blocks = tuple(spread_blocks(depth) if blocks is None else blocks)
        if not self.blocks or not all(-depth <= block < depth for block in self.blocks):
            raise ValueError(f"blocks is {list(self.blocks)}, expected some of {-depth}..{depth - 1}")
        self.head = SegmentationHead(encoder.config, classes, width, len(self.blocks))

    def forward(self, hsi: Tensor) -> Tensor:
        """`[B, C, T, H, W]` -> logits `[B, classes, S, S]` of the volume registered to S = image_size."""
        with torch.no_grad() if self.freeze_encoder else contextlib.nullcontext():
            _, maps = self.encoder.forward_intermediates(hsi, self.blocks, normalize=True)
        logits: Tensor = self.head(maps, resize(hsi, self.encoder.config.image_size))
        return logits


class SegmentationHead(nn.Module):
    """Folds the spectral axis of maps into channels, sums the maps, doubles them up to pixels, and adds the bands.

    A patch is coarse, and a pixel's own spectrum says much about its class: at full size the bands join through two
    layers that see one pixel each.

    Args:
        config: of the encoder.
        classes: number of classes.
        width: channels at the size of the tokens' grid; half of it from the second doubling on.
        maps: how many maps there are.

    Raises:
        ValueError: `classes` is below 1, or `width` no multiple of 16.
    """

    def __init__(self, config: MMMAEConfig, classes: int, width: int, maps: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes is {classes}, expected a whole number >= 1")
        if width < 1 or width % 16:
            raise ValueError(f"width is {width}, expected a multiple of 16")
        groups, *grid = config.grid
        self.sizes = doubled_sizes((grid[0], grid[1]), config.image_size)
        self.folds = nn.ModuleList(nn.Conv2d(config.dim * groups, width, 1) for _ in range(maps))
        widths = [width, *(width if step == 0 else width // 2 for step in range(len(self.sizes)))]
        self.steps = nn.ModuleList(_step(before, after) for before, after in itertools.pairwise(widths))
        pixel = width // 2
        bands = config.in_channels * config.bands
        self.spectra = nn.Sequential(nn.Conv2d(bands, pixel, 1), nn.GELU(), nn.Conv2d(pixel, pixel, 1), nn.GELU())
        self.join = _step(widths[-1] + pixel, pixel)
        self.classify = nn.Conv2d(pixel, classes, 1)
        nn.init.trunc_normal_(self.classify.weight, std=0.01)

    def forward(self, maps: Sequence[Tensor], volume: Tensor) -> Tensor:
        """Maps `[B, D, t, h, w]` and the volume `[B, C, T, S, S]` -> logits `[B, classes, S, S]`."""
        folded = (fold(tokens.flatten(1, 2)) for fold, tokens in zip(self.folds, maps, strict=True))
        features = torch.stack(list(folded)).sum(0)  # [B, width, h, w]
        for size, step in zip(self.sizes, self.steps, strict=True):
            features = step(F.interpolate(features, size, mode="bilinear", align_corners=False))
        spectra = self.spectra(volume.flatten(1, 2))
        logits: Tensor = self.classify(self.join(torch.cat([features, spectra], dim=1)))
        return logits


def spread_blocks(depth: int) -> list[int]:
    """Up to four block numbers, evenly over the depth, the last among them."""
    count = min(4, depth)
    return [depth * (number + 1) // count - 1 for number in range(count)]


def doubled_sizes(grid: tuple[int, int], image_size: int) -> list[tuple[int, int]]:
    """Sizes from the tokens' grid to `image_size` pixels: each side doubles until it is there."""
    sizes, size = [], grid
    while size != (image_size, image_size):
        size = (min(2 * size[0], image_size), min(2 * size[1], image_size))
        sizes.append(size)
    return sizes


def _step(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.GELU())

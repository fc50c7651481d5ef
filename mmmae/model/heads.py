"""Segmentation of images by an encoder and a head that reads the maps of a few blocks and the bands themselves."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_whole
from ..config import MMMAEConfig
from .encoder import HSIEncoder
from .resize import resize


class SegmentationModel(nn.Module):
    """An encoder with a light upsampling head that classifies each pixel.

    Args:
        encoder: it becomes part of the model, whose training changes it too.
        classes: number of classes.
        freeze_encoder: train only the head, without gradients through the encoder.
        width: channels of the head.
        blocks: numbers of the blocks whose maps the head reads; None means up to four, spread evenly over the depth.

    Raises:
        ValueError: an argument is not allowed; the message says what is.

    Example:
        >>> encoder = mmmae.fast_model("tiny").hsi_encoder()
        >>> model = mmmae.SegmentationModel(encoder, classes=3, freeze_encoder=True)
        >>> logits = model(torch.randn(2, 1, 12, 224, 224))
        >>> logits.shape  # a class for each pixel
        torch.Size([2, 3, 224, 224])
        >>> torch.nn.functional.cross_entropy(logits, torch.zeros(2, 224, 224, dtype=torch.int64)).backward()
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
            raise ValueError(f"blocks is {list(self.blocks)}, expected at least one number in {-depth}..{depth - 1}")
        self.head = SegmentationHead(encoder.config, classes, width, len(self.blocks))

    def forward(self, hsi: Tensor) -> Tensor:
        """Classify the pixels of `[B, C, T, H, W]`, resized to S = image_size; return logits `[B, classes, S, S]`."""
        with torch.no_grad() if self.freeze_encoder else contextlib.nullcontext():
            _, maps = self.encoder.forward_intermediates(hsi, self.blocks, normalize=True)
        logits: Tensor = self.head(maps, resize(hsi, self.encoder.config.image_size))
        return logits


class SegmentationHead(nn.Module):
    """Head that upsamples the summed maps of blocks to pixels, and joins them with the bands.

    The spectral axis of the maps is folded into channels. Patches are coarse, and the spectrum of a pixel says much
    about its class: at full size, the bands join through two layers of 1 x 1 convolutions.

    Args:
        config: of the encoder.
        classes: number of classes.
        width: channels on the grid of the tokens; half as many after the second doubling of the size.
        maps: number of maps.

    Raises:
        ValueError: `classes` is below 1, or `width` is not a multiple of 16.
    """

    def __init__(self, config: MMMAEConfig, classes: int, width: int, maps: int) -> None:
        super().__init__()
        check_whole("classes", classes, 1)
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
        """Compute logits `[B, classes, S, S]` from maps `[B, D, t, h, w]` and the volume `[B, C, T, S, S]`."""
        folded = (fold(tokens.flatten(1, 2)) for fold, tokens in zip(self.folds, maps, strict=True))
        features = torch.stack(list(folded)).sum(0)  # [B, width, h, w]
        for size, step in zip(self.sizes, self.steps, strict=True):
            features = step(F.interpolate(features, size, mode="bilinear", align_corners=False))
        spectra = self.spectra(volume.flatten(1, 2))
        logits: Tensor = self.classify(self.join(torch.cat([features, spectra], dim=1)))
        return logits


def spread_blocks(depth: int) -> list[int]:
    """Return up to four block numbers, spread evenly over the depth and ending with the last."""
    count = min(4, depth)
    return [depth * (number + 1) // count - 1 for number in range(count)]


def doubled_sizes(grid: tuple[int, int], image_size: int) -> list[tuple[int, int]]:
    """Return the sizes from the grid of tokens to `image_size`, each side doubling until it reaches it."""
    sizes, size = [], grid
    while size != (image_size, image_size):
        size = (min(2 * size[0], image_size), min(2 * size[1], image_size))
        sizes.append(size)
    return sizes


def _step(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.GELU())

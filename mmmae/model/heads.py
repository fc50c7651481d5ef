"""Segmentation of images by an encoder and a head that reads the maps of a few blocks and the bands themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_whole
from ..config import MMMAEConfig
from .conventions import ClassifierConventions
from .encoder import HSIEncoder
from .inputs import check_hsi
from .resize import resize
from .spectra import SIDES, MeansLinear, Spectra

LEVELS = 3  # sizes at which the head reads the bands: full, half and quarter
ALONE = 0.25  # share of the samples of a training step that are classified by their spectra alone
PACE = 350.0  # sum of the scales of the classifier's spectral inputs, each at most 10
HEAD_FORMAT = 3  # 1 joined the bands with the sum of all maps, 2 read single spectra as they were


class SegmentationModel(ClassifierConventions):
    """An encoder with a head that classifies each pixel by its spectrum and by its surroundings.

    Args:
        encoder: it becomes part of the model, whose training changes it too.
        classes: number of classes.
        freeze_encoder: train only the head, without gradients through the encoder.
        width: channels of the head.
        blocks: numbers of the blocks whose maps the head reads; None means up to four, spread evenly over the depth.
            Without any, the encoder is not run: the head sees the bands alone.
        sides: of the squares around each pixel whose mean spectra the head reads, odd numbers of pixels. `(1,)`, the
            pixel's own spectrum alone, has less to learn, which helps where few labels are to serve other scenes.

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

    encoder: HSIEncoder

    def __init__(
        self,
        encoder: HSIEncoder,
        classes: int,
        *,
        freeze_encoder: bool = False,
        width: int = 64,
        blocks: Sequence[int] | None = None,
        sides: Sequence[int] = SIDES,
    ) -> None:
        super().__init__()
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        depth = encoder.config.depth
        self.width, self.blocks = width, tuple(spread_blocks(depth) if blocks is None else blocks)
        if not all(-depth <= block < depth for block in self.blocks):
            raise ValueError(f"blocks is {list(self.blocks)}, expected numbers in {-depth}..{depth - 1}")
        self.sides = check_sides("sides", sides)
        self.head = SegmentationHead(encoder.config, classes, width, len(self.blocks), self.sides)

    def forward(self, hsi: Tensor) -> Tensor:
        """Classify the pixels of `[B, C, T, H, W]`, resized to S = image_size; return logits `[B, classes, S, S]`."""
        config, device = self.encoder.config, self.encoder.pos_embed_spatial.device
        check_hsi(config, hsi, device)
        maps: list[Tensor] = []
        if self.blocks:
            with torch.no_grad() if self.freeze_encoder else contextlib.nullcontext():
                _, maps = self.encoder.forward_intermediates(hsi, self.blocks, normalize=True)
        logits: Tensor = self.head(maps, resize(hsi, config.image_size))
        return logits

    def fit_spectra(self, volumes: Iterable[Tensor]) -> None:
        """Set the statistics by which the head standardises spectra, before training; see `Spectra`.

        Args:
            volumes: of the training data, each `[B, C, T, H, W]` in the encoder's number of channels and bands.
        """
        config, device = self.encoder.config, self.encoder.pos_embed_spatial.device
        self.head.spectra.fit(resize(hsi.to(device), config.image_size).flatten(1, 2) for hsi in volumes)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.head.classify.out_channels

    def get_classifier(self) -> PixelLogits:
        """Return the layer that computes the logits."""
        return self.head.classify

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the layer that computes the logits by an untrained one, on the encoder's device."""
        self.head.reset_classifier(num_classes)
        like = self.encoder.pos_embed_spatial
        self.head.classify.to(like.device, like.dtype)


class SegmentationHead(nn.Module):
    """Head with one linear classifier of what a pixel is: its spectrum, and features of its surroundings.

    Spectra are those of the pixel and the means of small squares around it, in which there is less noise. The features
    come from a small U-Net: its way down reads the spectra at full, half and quarter size, its way up begins at the
    maps of the encoder and joins them with the spectra. The classifier starts near 0, and in training some samples are
    classified without these features, so that it is a good classifier of spectra, to which surroundings add. Norms are
    of single pixels: those of an image would take away how bright it is.

    Args:
        config: of the encoder.
        classes: number of classes.
        width: channels on the grid of the tokens; half as many after the second doubling of the size.
        maps: number of maps; without any, the way up begins at the bands.
        sides: of the squares whose mean spectra are read.

    Raises:
        ValueError: `classes` is below 1, or `width` is not a multiple of 16.
    """

    def __init__(self, config: MMMAEConfig, classes: int, width: int, maps: int, sides: Sequence[int] = SIDES) -> None:
        super().__init__()
        if width < 1 or width % 16:
            raise ValueError(f"width is {width}, expected a multiple of 16")
        groups, rows, columns = config.grid
        half = width // 2
        sizes = [(rows, columns), *doubled_sizes((rows, columns), config.image_size)]
        levels = min(LEVELS, len(sizes))
        self.spectra = Spectra(config.in_channels * config.bands)
        self.stem = MeansLinear(self.spectra.channels, half, sides)
        self.down = nn.ModuleList(_step(half, half) for _ in range(levels))
        self.folds = nn.ModuleList(nn.Conv2d(config.dim * groups, half, 1) for _ in range(maps))
        self.down_sizes = sizes[: -levels - 1 : -1]
        self.up_sizes = sizes if maps else self.down_sizes[::-1]
        self.up = nn.ModuleList()
        before = half * maps
        for number, size in enumerate(self.up_sizes):
            after = width if number < 2 and size != sizes[-1] else half
            self.up.append(_step(before + (half if size in self.down_sizes else 0), after))
            before = after
        self.features = before
        self.reset_classifier(classes)

    def reset_classifier(self, classes: int) -> None:
        """Replace the classifier by an untrained one."""
        check_whole("classes", classes, 1)
        self.classify = PixelLogits(self.spectra.channels, self.features, classes, self.stem.sides)

    def forward(self, maps: Sequence[Tensor], volume: Tensor) -> Tensor:
        """Compute logits `[B, classes, S, S]` from maps `[B, D, t, h, w]` and the volume `[B, C, T, S, S]`."""
        spectra = self.spectra(volume.flatten(1, 2))
        bands, features = {}, self.stem(spectra)
        for size, step in zip(self.down_sizes, self.down, strict=True):
            bands[size] = features = step(_interpolate(features, size))
        joined = [fold(tokens.flatten(1, 2)) for fold, tokens in zip(self.folds, maps, strict=True)]
        for size, step in zip(self.up_sizes, self.up, strict=True):
            parts = [_interpolate(features, size) for features in joined]
            joined = [step(torch.cat([*parts, bands[size]] if size in bands else parts, dim=1))]
        context = joined[0]
        if self.training:
            context = context * (torch.rand(len(context), 1, 1, 1, device=context.device) >= ALONE)
        logits: Tensor = self.classify(spectra, context)
        return logits


class PixelLogits(nn.Module):
    """Linear classifier of standardised spectra and of features of their surroundings, near 0 before training.

    Args:
        channels: of the spectra.
        features: channels of the features.
        classes: number of classes.
        sides: of the squares whose mean spectra are read.
    """

    def __init__(self, channels: int, features: int, classes: int, sides: Sequence[int] = SIDES) -> None:
        super().__init__()
        self.out_channels = classes
        # Adam moves each weight by the learning rate, and so a logit by that times the sum of the inputs.
        self.scale = min(10.0, PACE / channels)
        self.spectra = MeansLinear(channels, classes, sides)
        self.context = nn.Conv2d(features, classes, 1, bias=False)
        nn.init.zeros_(self.spectra.weight)
        nn.init.zeros_(self.spectra.bias)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.context.weight, std=0.01)

    def forward(self, spectra: Tensor, features: Tensor) -> Tensor:
        """Return logits `[B, classes, H, W]` for spectra `[B, channels, H, W]` and features `[B, features, H, W]`."""
        logits: Tensor = self.spectra(self.scale * spectra) + self.context(features)
        return logits


def check_sides(name: str, sides: Sequence[int]) -> tuple[int, ...]:
    """Return the sides of squares as a tuple.

    Raises:
        ValueError: they are not different odd numbers, at least one.
    """
    odd = all(isinstance(side, int) and side > 0 and side % 2 == 1 for side in sides)
    if not odd or len({*sides}) < max(1, len(sides)):
        found = ", ".join(map(str, sides)) or "none"
        raise ValueError(f"{name} is {found}, expected different odd numbers of pixels like 1, 3, 7")
    return tuple(sides)


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


class PixelNorm(nn.LayerNorm):
    """A layer norm over the channels of each pixel of `[B, C, H, W]`."""

    def forward(self, image: Tensor) -> Tensor:
        """Normalise each pixel."""
        return super().forward(image.movedim(1, -1)).movedim(-1, 1)


def _interpolate(features: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(features.shape[-2:]) == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


def _step(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), PixelNorm(after), nn.GELU())

"""Tiles of large scenes: their positions, the grids of their auxiliary images, and maps put together from them."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .readers.windows import Window


class Position(NamedTuple):
    """The place of a tile: its scene, and its window in pixels of the scene's cube."""

    scene: str
    window: Window

    @property
    def name(self) -> str:
        """The name of the tile, like `scene1@r0c48`, with the row and column of its upper left corner."""
        return f"{self.scene}@r{self.window.row}c{self.window.column}"


def untile(tiles: Iterable[Tensor], positions: Sequence[Position], *, weighted: bool = False) -> dict[str, Tensor]:
    """Put results for tiles together into one map a scene; where tiles overlap, the map is their mean.

    Args:
        tiles: `[C, h, w]` for each position, in the order of `positions`; resized bilinearly to the window if it has
            another size. Pass logits or probabilities: class numbers have no mean.
        positions: of the tiles, as in `PairedFolder.positions`.
        weighted: weigh the pixels of a tile by `window_weights`, so that tiles fade into each other.

    Returns:
        scene -> `[C, H, W]` float32, on the device of the tiles; NaN where no tile lies.

    Raises:
        ValueError: the numbers of tiles and positions differ, or a tile does not have three dimensions.
    """
    sizes = scene_sizes(positions)
    mosaics: dict[str, Mosaic] = {}
    placed = 0
    for tile in tiles:
        if placed == len(positions):
            raise ValueError(f"there are more tiles than the {len(positions)} positions")
        if tile.ndim != 3:
            raise ValueError(f"a tile has shape {list(tile.shape)}, expected [C, H, W]")
        scene, window = positions[placed]
        if scene not in mosaics:
            mosaics[scene] = Mosaic(len(tile), sizes[scene], tile.device, weighted=weighted)
        mosaics[scene].add(tile, window)
        placed += 1
    if placed < len(positions):
        raise ValueError(f"there are {placed} tiles for {len(positions)} positions")
    return {scene: mosaic.mean() for scene, mosaic in mosaics.items()}


class Mosaic:
    """The map of one scene, put together tile by tile; where tiles overlap, it is their mean.

    Args:
        channels: C.
        size: (height, width) of the scene.
        device: device of the tiles.
        weighted: weigh the pixels of a tile by `window_weights`.
    """

    def __init__(self, channels: int, size: tuple[int, int], device: torch.device, *, weighted: bool = False) -> None:
        self._total = torch.zeros(channels, *size, device=device)
        self._count = torch.zeros(*size, device=device)
        self._weighted = weighted

    def add(self, tile: Tensor, window: Window) -> None:
        """Add a tile `[C, h, w]`; it is resized bilinearly to the window if it has another size."""
        values = fit(tile, window)
        weights = window_weights(window.height, window.width, tile.device) if self._weighted else values.new_ones(())
        rows, columns = window.slices
        self._total[:, rows, columns] += values * weights
        self._count[rows, columns] += weights

    def mean(self) -> Tensor:
        """Return the map `[C, H, W]` float32; NaN where no tile lies."""
        return self._total / self._count


def fit(tile: Tensor, window: Window) -> Tensor:
    """Return a tile `[C, h, w]` in float32, resized bilinearly to the window if it has another size."""
    values, size = tile.float(), (window.height, window.width)
    if tuple(values.shape[1:]) == size:
        return values
    return F.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]


def window_weights(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the weights `[height, width]` by which overlapping tiles are averaged, all above 0.

    They fall off linearly from the middle to the edges, where a tile shows a pixel the least of its surroundings. Two
    tiles that share up to half of their pixels fade into each other linearly.
    """
    rows, columns = (1 - ((torch.arange(side, device=device) + 0.5) * 2 / side - 1).abs() for side in (height, width))
    return rows[:, None] * columns


def scene_sizes(positions: Iterable[Position]) -> dict[str, tuple[int, int]]:
    """Return scene -> (height, width) of the rectangle from its upper left corner that holds all its tiles."""
    sizes: dict[str, tuple[int, int]] = {}
    for scene, (row, column, height, width) in positions:
        bottom, right = sizes.get(scene, (0, 0))
        sizes[scene] = max(bottom, row + height), max(right, column + width)
    return sizes


def grid_factor(cube: tuple[int, int], image: tuple[int, int], tile: int, overlap: int) -> Fraction:
    """Return the size of an auxiliary image over that of its cube, both (height, width).

    Raises:
        ValueError: the ratio is not an integer or the inverse of one, or tiles would cut pixels of the image.
    """
    factor = Fraction(image[0], cube[0])
    sizes = f"the image is {image[0]} x {image[1]}, the cube {cube[0]} x {cube[1]}"
    if factor != Fraction(image[1], cube[1]) or 1 not in (factor.numerator, factor.denominator):
        raise ValueError(f"misaligned: {sizes}; tiles need an integer multiple or fraction of the cube's size")
    if tile * factor % 1 or (tile - overlap) * factor % 1:
        raise ValueError(
            f"misaligned: {sizes}; tile {tile} and overlap {overlap} need to be multiples of {factor.denominator}"
        )
    return factor


def scaled(window: Window, factor: Fraction) -> Window:
    """Return the window in pixels of a grid that is `factor` times as fine."""
    return Window(*(int(number * factor) for number in window))

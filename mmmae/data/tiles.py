"""Large scenes as tiles by position: where each is, on which grid its auxiliary images lie, and maps made of them."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .readers.windows import Window


class Position(NamedTuple):
    """Where a tile is: its scene, and its window in pixels of the scene's cube."""

    scene: str
    window: Window

    @property
    def name(self) -> str:
        """As in `scene1@0,48`: row and column of the upper left corner."""
        return f"{self.scene}@{self.window.row},{self.window.column}"


def untile(tiles: Iterable[Tensor], positions: Sequence[Position]) -> dict[str, Tensor]:
    """Put what was computed of tiles together to one map a scene; where tiles overlap, the map is their mean.

    Args:
        tiles: one `[C, h, w]` a position, in the order of `positions`; of another size than the window it is resized to
            it bilinearly. Use logits or probabilities: numbers of classes have no mean.
        positions: of the tiles, as in `PairedFolder.positions`; those of one scene cover it.

    Returns:
        scene -> `[C, H, W]` float32, on the device of the tiles; NaN where no tile lies.

    Raises:
        ValueError: there are more tiles than positions or fewer, or a tile has not three dimensions.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for scene, (row, column, height, width) in positions:
        bottom, right = sizes.get(scene, (0, 0))
        sizes[scene] = max(bottom, row + height), max(right, column + width)
    maps: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    placed = 0
    for tile in tiles:
        if placed == len(positions):
            raise ValueError(f"there are more tiles than the {len(positions)} positions")
        if tile.ndim != 3:
            raise ValueError(f"a tile has shape {list(tile.shape)}; expected [C, H, W]")
        scene, window = positions[placed]
        values, size = tile.float(), (window.height, window.width)
        if tuple(values.shape[1:]) != size:
            values = F.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]
        if scene not in maps:
            maps[scene] = values.new_zeros((len(values), *sizes[scene]))
            counts[scene] = values.new_zeros(sizes[scene])
        rows, columns = window.slices
        maps[scene][:, rows, columns] += values
        counts[scene][rows, columns] += 1
        placed += 1
    if placed < len(positions):
        raise ValueError(f"there are {placed} tiles for {len(positions)} positions")
    return {scene: total / counts[scene] for scene, total in maps.items()}


def grid_factor(cube: tuple[int, int], image: tuple[int, int], tile: int, overlap: int) -> Fraction:
    """How many pixels of an auxiliary image lie along one of the cube; every tile covers whole pixels of both.

    Raises:
        ValueError: the image is no integer multiple or fraction of the cube (both in height, width), or tiles would cut
            its pixels.
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
    """The window on the grid that `factor` leads to."""
    return Window(*(int(number * factor) for number in window))

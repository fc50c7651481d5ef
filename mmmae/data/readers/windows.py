"""Rectangular windows of an image, and the grid of tiles that covers it."""

from typing import Literal, NamedTuple, TypeAlias

Edges: TypeAlias = Literal["refuse", "clip", "cut"]


class Window(NamedTuple):
    """A rectangle of pixels; (row, column) is its upper left corner."""

    row: int
    column: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """The slice of rows and that of columns."""
        return slice(self.row, self.row + self.height), slice(self.column, self.column + self.width)

    def check_within(self, height: int, width: int) -> None:
        """Raise ValueError if part of the window is outside an image of `height` x `width`."""
        if min(self.row, self.column) < 0 or self.row + self.height > height or self.column + self.width > width:
            raise ValueError(
                f"the window of {self.height} x {self.width} pixels at row {self.row}, column {self.column} is not "
                f"within the image of {height} x {width}"
            )


def tile_grid(height: int, width: int, tile: int, overlap: int = 0, edges: Edges = "refuse") -> list[Window]:
    """Cover an image of `height` x `width` by squares of `tile` pixels, listed row by row.

    Args:
        height, width: size of the image.
        tile: side of a tile.
        overlap: pixels that neighbours share; the last of a row or column may share more.
        edges: what happens where tiles end. `refuse`: the last tile of a row or column is moved inwards to end with the
            image, and images smaller than a tile are refused. `clip`: the same, but tiles of an image smaller than a
            tile are as small as the image. `cut`: tiles lie on a regular grid, and the last ones are cut off.

    Raises:
        ValueError: the image is smaller than a tile, and `edges` is `refuse`.
    """
    if edges == "refuse" and min(height, width) < tile:
        raise ValueError(f"the image is {height} x {width}, smaller than a tile of {tile} x {tile}")
    rows, columns = (_corners(side, tile, overlap, edges) for side in (height, width))
    return [
        Window(row, column, min(tile, height - row), min(tile, width - column)) for row in rows for column in columns
    ]


def _corners(side: int, tile: int, overlap: int, edges: Edges) -> list[int]:
    if edges == "cut":
        return list(range(0, max(1, side - overlap), tile - overlap))
    last = max(0, side - tile)
    return [*range(0, last, tile - overlap), last]

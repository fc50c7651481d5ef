"""Rectangular windows of an image, and the grid of tiles that covers it."""

from typing import NamedTuple


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


def tile_grid(height: int, width: int, tile: int, overlap: int = 0) -> list[Window]:
    """Cover an image of `height` x `width` by squares of `tile` pixels, listed row by row.

    Neighbours share `overlap` pixels; the last of a row or column is moved inwards to end with the image, so it shares
    more.

    Raises:
        ValueError: the image is smaller than a tile.
    """
    if min(height, width) < tile:
        raise ValueError(f"the image is {height} x {width}, smaller than a tile of {tile} x {tile}")
    rows, columns = (_corners(side, tile, tile - overlap) for side in (height, width))
    return [Window(row, column, tile, tile) for row in rows for column in columns]


def _corners(side: int, tile: int, stride: int) -> list[int]:
    last = side - tile
    return [*range(0, last, stride), last]

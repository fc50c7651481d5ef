"""Maps of scenes, put together of tiles from top to bottom; only the rows that tiles may still reach are held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.readers.windows import Window
from ...data.tiles import window_weights


class Tile(NamedTuple):
    """What a model says about a tile: values `[C, h, w]`, and which pixels are valid `[h, w]`."""

    scene: str
    window: Window
    values: Tensor
    valid: Tensor


class Rows(NamedTuple):
    """The next rows of a map: values `[C, n, W]`, 0 where no tile lies, and which pixels are valid `[n, W]`."""

    values: Tensor
    valid: Tensor


def stitch(tiles: Iterable[Tile], channels: int, width: int) -> Iterator[Rows]:
    """Put the tiles of one scene together; where they overlap, the map is their mean, weighted by `window_weights`.

    As many rows are held as a tile has.

    Args:
        tiles: row by row, as `tile_grid` lists them.
        channels: C.
        width: W, of the scene.

    Yields:
        All rows of the map, from top to bottom.

    Raises:
        ValueError: a tile lies above rows that are finished.
    """
    total, weight, valid = torch.zeros(channels, 0, width), torch.zeros(0, width), torch.zeros(0, width).bool()
    first = 0  # row of the scene in which the held rows begin
    for scene, window, values, known in tiles:
        if window.row < first:
            raise ValueError(f"a tile of scene {scene!r} begins in row {window.row}, but rows above {first} are done")
        if window.row > first:
            done = window.row - first
            yield _finish(total[:, :done], weight[:done], valid[:done])
            total, weight, valid, first = total[:, done:], weight[done:], valid[done:], window.row
        if (missing := window.height - len(weight)) > 0:
            total = torch.cat([total, total.new_zeros(channels, missing, width)], dim=1)
            weight = torch.cat([weight, weight.new_zeros(missing, width)])
            valid = torch.cat([valid, valid.new_zeros(missing, width)])
        rows, columns = slice(0, window.height), window.slices[1]
        weights = window_weights(window.height, window.width)
        total[:, rows, columns] += values * weights
        weight[rows, columns] += weights
        valid[rows, columns] |= known
    yield _finish(total, weight, valid)


def _finish(total: Tensor, weight: Tensor, valid: Tensor) -> Rows:
    return Rows(total / weight.where(weight > 0, 1.0), valid)  # pixels without a tile are not valid

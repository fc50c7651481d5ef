"""Features of scenes as GeoTIFFs, with a band for each channel and a pixel for each token."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import functional as F

from ...config import MMMAEConfig
from ...data.readers.windows import Window
from ...data.subjects import Subjects
from ...data.tiles import scene_sizes
from ...files import check_can_write, file_for, write_atomically
from ...model.encoder import HSIEncoder
from ...model.losses import VALID_SHARE
from ...precision import Precision, resolve_precision
from .batches import batches, check_options, check_outputs, first_subjects
from .encode import check_finite, encode_batch, pooled, usable_device
from .rasters import find_place, open_raster
from .stitching import Tile, stitch


def encode_rasters(
    encoder: HSIEncoder,
    subjects: Subjects,
    out: str | Path,
    *,
    window: int,
    batch: int = 8,
    workers: int = 0,
    device: str = "cpu",
    precision: Precision = "auto",
) -> list[Path]:
    """Write the features of each scene as a GeoTIFF `NAME.tif`, float32, with D bands, the mean over spectral groups.

    A pixel of the raster is a token: its side is `window` pixels of the cube over the tokens along a tile. The raster
    begins where the cube begins, and ends with the last token that has a pixel of the cube. It is NaN where less than
    30 % of a token's pixels lie in the cube and have data. Scenes are read, encoded and written tile by tile; features
    of overlapping tiles are averaged by `window_weights`.

    Args:
        encoder: moved to `device` and set to evaluation mode.
        subjects: tiles of scenes in their own size (`image_size=None`), on a regular grid (`edges="cut"`).
        out: the folder; other files in it stay.
        window: side in pixels of the tiles; cut ones are continued by reflection.
        batch: tiles a forward pass.
        workers, device, precision: as for `encode`.

    Returns:
        The rasters.

    Raises:
        ValueError: an argument is not allowed, the subjects do not fit the encoder, tiles cut tokens, a file of the
            subjects would be replaced, or a feature is not finite.
        OSError: a file can't be read or written.
    """
    out, config = Path(out), encoder.config
    check_options(config, subjects, precision, batch=batch, workers=workers)
    if not subjects.positions:
        raise ValueError("the subjects are no tiles of scenes, expected a PairedFolder with tile= (--hsi)")
    pixels = token_pixels(config, window)
    for _, (row, column, _, _) in subjects.positions:
        if row % pixels[0] or column % pixels[1]:
            raise ValueError(
                f"a tile begins at row {row}, column {column}, expected multiples of {pixels[0]} and {pixels[1]}, the "
                "pixels of a token; choose another overlap"
            )
    scenes = scene_sizes(subjects.positions)
    paths = {scene: file_for(out, scene, ".tif") for scene in scenes}
    check_outputs(subjects, paths.values())
    precision = resolve_precision(precision, usable_device(device), config.dim)
    check_can_write(out)
    out.mkdir(parents=True, exist_ok=True)
    firsts = first_subjects(subjects)
    tiles = _tiles(encoder.eval().to(device), subjects, pixels, window, batch, workers, device, precision)
    for scene, group in itertools.groupby(tiles, key=lambda tile: tile.scene):
        size = -(-scenes[scene][0] // pixels[0]), -(-scenes[scene][1] // pixels[1])
        cube = subjects.files(firsts[scene]).get("hsi")
        place = find_place(cube, size, (size[0] * pixels[0], size[1] * pixels[1]))
        write_atomically(
            paths[scene], functools.partial(_write, tiles=group, channels=config.dim, size=size, place=place)
        )
    return list(paths.values())


def _write(path: Path, tiles: Iterable[Tile], channels: int, size: tuple[int, int], place: Mapping[str, Any]) -> None:
    names = [f"feature {number}" for number in range(channels)]
    with open_raster(path, names, size, "float32", np.nan, place) as target:
        for values, valid in stitch(tiles, channels, size[1]):
            target.write(values.masked_fill(~valid, np.nan).numpy())


def token_pixels(config: MMMAEConfig, window: int) -> tuple[int, int]:
    """Return (height, width) of a token in pixels of a tile, whose side is `window`.

    Raises:
        ValueError: they are not whole numbers.
    """
    _, rows, columns = config.grid
    if window % rows or window % columns:
        raise ValueError(f"tiles of {window} pixels have {rows} x {columns} tokens, expected a multiple of both")
    return window // rows, window // columns


def _tiles(
    encoder: HSIEncoder,
    subjects: Subjects,
    pixels: tuple[int, int],
    window: int,
    batch: int,
    workers: int,
    device: str,
    precision: Precision,
) -> Iterator[Tile]:
    """Yield the features of each tile, with its window in tokens."""
    positions = iter(subjects.positions)
    for samples in batches(subjects, batch, workers, label="encoding", window=window):
        features = pooled(encode_batch(encoder, samples, precision, device), "spatial").cpu()
        check_finite(features, samples, precision)
        places = list(itertools.islice(positions, len(samples)))
        for valid, (_, place) in zip(samples.valid, places, strict=True):
            valid[place.height :], valid[:, place.width :] = False, False  # pixels that reflection made
        known = F.avg_pool2d(samples.valid[:, None].float(), pixels)[:, 0] >= VALID_SHARE  # [B, h, w]
        for (scene, place), values, valid in zip(places, features, known, strict=True):
            rows, columns = (-(-side // token) for side, token in zip(place[2:], pixels, strict=True))
            tokens = Window(place.row // pixels[0], place.column // pixels[1], rows, columns)
            yield Tile(scene, tokens, values.movedim(-1, 0)[:, :rows, :columns], valid[:rows, :columns])

"""`mmmae encode`: features of a folder of cubes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from ..checks import check_whole
from ..files import check_can_write
from ..precision import Precision
from .options import Flag
from .output import say
from .trained import TrainedDataOptions, load_encoder


def run(
    data: TrainedDataOptions,
    *,
    encoder: Path,
    out: Path,
    pool: Literal["mean", "spatial", "tokens"] = "mean",
    raster: Flag = False,
    batch: int = 8,
    workers: int = 0,
    device: str = "cpu",
    precision: Precision = "auto",
) -> None:
    """Write the features of cubes.

    Args:
        encoder: folder of the encoder, as RUN/encoder
        out: features.safetensors or features.npz, by the suffix; with --raster a folder
        pool: mean: one vector per cube; spatial: a map of vectors; tokens: all of them, over bands too
        raster: write a GeoTIFF of each cube, of any size, with a band for each channel and a pixel for each token, tile
            by tile; a tile has as many pixels as the encoder's images, and shares a quarter of them with the next one,
            unless --tile and --overlap say otherwise
        batch: cubes or tiles in a batch
        workers: processes that read data
        device: cpu or cuda
        precision: 32 bits, or autocast to bf16 or 16 bits; auto: bf16 where it is faster
    """
    check_whole("--workers", workers, 0)
    how: dict[str, Any] = {"batch": batch, "workers": workers, "device": device, "precision": precision}
    if raster:
        if pool != "mean":
            raise ValueError("--pool is for one file of features; rasters hold the mean over the groups of bands")
        _write_rasters(data, encoder, out, how)
        return
    from ..training.inference.encode import check_features_file, encode

    check_features_file(out)
    model, subjects = load_encoder(data, encoder)
    shape = encode(model, subjects, out, pool=pool, **how)
    say(repr(subjects))
    say(f"wrote features [{', '.join(map(str, shape))}] into {out}")


def _write_rasters(data: TrainedDataOptions, encoder: Path, out: Path, how: dict[str, Any]) -> None:
    """Cut the cubes into tiles that end with tokens, and write a raster of each."""
    from ..model.pretrained import read_config
    from ..training.inference.feature_rasters import encode_rasters, token_pixels

    if data.hsi is None:
        raise ValueError("--raster needs --hsi, the cubes of the rasters")
    check_can_write(out)
    config = read_config(encoder)
    window = data.tile or config.image_size
    step = math.lcm(*token_pixels(config, window))
    overlap = window // 4 // step * step if data.overlap is None else data.overlap
    model, subjects = load_encoder(dataclasses.replace(data, tile=window, overlap=overlap), encoder, tiles="cut")
    say(repr(subjects))
    rasters = encode_rasters(model, subjects, out, window=window, **how)
    say(f"wrote {len(rasters)} {'raster' if len(rasters) == 1 else 'rasters'} into {out}, such as {rasters[0].name}")

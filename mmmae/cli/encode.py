"""`mmmae encode`: features of a folder of cubes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..checks import check_whole
from ..precision import Precision
from .trained import TrainedDataOptions, load_encoder


def run(
    data: TrainedDataOptions,
    *,
    encoder: Path,
    out: Path,
    pool: Literal["mean", "spatial", "tokens"] = "mean",
    batch: int = 8,
    workers: int = 0,
    device: str = "cpu",
    precision: Precision = "auto",
) -> None:
    """Write the features of cubes.

    Args:
        encoder: folder of the encoder, as RUN/encoder
        out: features.safetensors or features.npz, by the suffix
        pool: mean: one vector per cube; spatial: a map of vectors; tokens: all of them, over bands too
        batch: cubes in a batch
        workers: processes that read data
        device: cpu or cuda
        precision: 32 bits, or autocast to bf16 or 16 bits; auto: bf16 where it is faster
    """
    from ..training.inference.encode import encode

    check_whole("--workers", workers, 0)
    model, subjects = load_encoder(data, encoder)
    shape = encode(model, subjects, out, pool=pool, batch=batch, workers=workers, device=device, precision=precision)
    print(f"{subjects!r}\nwrote features [{', '.join(map(str, shape))}] into {out}")

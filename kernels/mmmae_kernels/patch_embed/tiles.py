"""Launch table of the implicit GEMMs: tiles for each architecture and precision."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from ..gpu.architecture import target_of
from ..gpu.config import Config, family_of

PROGRAMS = 128  # about the number of multiprocessors of large GPUs: fewer programs leave some of them idle
ROWS_PER_SPLIT = 128  # lower limit in the weight gradient: a program waits for its first rows


def _tile(rows: int, columns: int, depth: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}, warps, stages)


# A stage holds BLOCK_K * (BLOCK_M + BLOCK_N) elements in shared memory, 16 KiB in half precision for 128 x 128 x 32; a
# float32 volume doubles the part of its rows. The accumulator takes BLOCK_M * BLOCK_N / threads registers of a thread
# (64 for 128 x 128 and 8 warps), addresses and operands about as many again. "exact", float32 as three tf32 products,
# splits each operand in two, hence its smaller tiles. The matrix instructions of sm_90 and sm_100 want a BLOCK_K of 64;
# CDNA has 64 KiB of shared memory and warps of 64 threads; RDNA multiplies 16 x 16 x 16 out of registers.
_AMPERE = {
    "half": (_tile(128, 128, 32, 8, 4), _tile(64, 128, 32, 8, 4), _tile(64, 64, 32, 4, 4)),
    "tf32": (_tile(128, 128, 32, 8, 3), _tile(64, 128, 32, 8, 3), _tile(64, 64, 32, 4, 3)),
    "exact": (_tile(64, 64, 32, 4, 3), _tile(64, 32, 32, 4, 3)),
}
TILES: dict[str, dict[str, tuple[Config, ...]]] = {
    "ampere": _AMPERE,
    "small": {
        "half": (_tile(128, 128, 32, 8, 3), _tile(64, 128, 32, 8, 3), _tile(64, 64, 32, 4, 3)),
        "tf32": (_tile(64, 128, 32, 8, 3), _tile(64, 64, 32, 4, 3)),
        "exact": (_tile(64, 64, 32, 8, 3), _tile(64, 32, 32, 4, 3)),
    },
    "hopper": {
        "half": (_tile(128, 128, 64, 8, 3), _tile(128, 64, 64, 4, 3), _tile(64, 64, 32, 4, 3)),
        "tf32": (_tile(128, 128, 32, 8, 3), _tile(128, 64, 32, 4, 3), _tile(64, 64, 32, 4, 3)),
        "exact": (_tile(64, 64, 32, 4, 3), _tile(64, 32, 32, 4, 3)),
    },
    "cdna": {
        "half": (_tile(128, 128, 32, 8, 2), _tile(64, 64, 32, 4, 2)),
        "exact": (_tile(128, 64, 32, 8, 2), _tile(64, 64, 32, 4, 2)),
    },
    "rdna": {
        "half": (_tile(128, 64, 32, 8, 2), _tile(64, 64, 32, 4, 2)),
        "exact": (_tile(64, 64, 16, 8, 2), _tile(32, 64, 16, 4, 2)),
    },
}


def precision_of(dtype: torch.dtype, device: torch.device) -> str:
    """Return the `input_precision` of `tl.dot`, which for float32 follows `torch.get_float32_matmul_precision()`."""
    if target_of(device).startswith("gfx"):
        return "ieee"  # AMD's matrix instructions compute in float32
    if dtype == torch.float32 and _is_exact():
        return "tf32x3"
    return "tf32"


def _is_exact() -> bool:
    """Return whether torch's settings ask for exact float32 products."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # raised if the newer setting was changed as well; it then takes precedence
        return _newer_setting() in ("ieee", "none")


def _newer_setting() -> str:
    return str(torch.backends.cuda.matmul.fp32_precision)


def tiles(
    target: str, dtype: torch.dtype, precision: str, rows: int, columns: int, splits: int = 1
) -> tuple[Config, ...]:
    """Return the configs for a launch; the first is the largest tile that still gives every multiprocessor work."""
    family = TILES[family_of(target)]
    kind = "half" if dtype.itemsize == 2 else "tf32" if precision == "tf32" else "exact"
    fills = [tile for tile in family[kind] if tile_count(tile.constants, rows, columns) * splits >= PROGRAMS]
    best = fills[0] if fills else family[kind][-1]
    return (best, *(tile for tile in family[kind] if tile is not best))


def tile_count(constants: Mapping[str, int], rows: int, columns: int) -> int:
    """Return how many tiles cover `rows x columns`."""
    return -(-rows // constants["BLOCK_M"]) * -(-columns // constants["BLOCK_N"])


def weight_splits(rows: int, width: int, elements: int, grad_bytes: int, volume_bytes: int) -> int:
    """Return into how many sums the weight gradient divides its rows; a single one is the gradient itself.

    As many as give each multiprocessor two large tiles, but so few that writing and reading them moves no more than the
    inputs. The number depends on the call alone, so that the order of a sum does not depend on the GPU.

    Args:
        rows: number of patches.
        width: channels of the embedding.
        elements: elements of a patch.
        grad_bytes: size of an element of the incoming gradient.
        volume_bytes: size of an element of the volume.
    """
    inputs, partial = rows * (width * grad_bytes + elements * volume_bytes), width * elements * 4
    tiles_of_128 = tile_count({"BLOCK_M": 128, "BLOCK_N": 128}, width, elements)
    return max(1, min(2 * PROGRAMS // tiles_of_128, inputs // (2 * partial), rows // ROWS_PER_SPLIT))


@functools.lru_cache(maxsize=1024)
def most_tiles(target: str, dtype: torch.dtype, precision: str, rows: int, columns: int) -> int:
    """Return how many tiles cover `rows x columns` with the smallest tile of the table."""
    return max(tile_count(tile.constants, rows, columns) for tile in tiles(target, dtype, precision, rows, columns))

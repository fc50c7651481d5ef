"""Launch table of the implicit GEMMs: which tile, for which architecture and precision."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from ..gpu.config import Config, family_of
from ..gpu.launch import target_of

PROGRAMS = 128  # about the multiprocessors of the larger GPUs: fewer programs leave some idle


def _tile(rows: int, columns: int, depth: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}, warps, stages)


# A stage holds BLOCK_K * (BLOCK_M + BLOCK_N) elements in shared memory, 16 KiB in half precision for 128 x 128 x 32,
# and the float32 rows of a volume twice their share. The sum takes BLOCK_M * BLOCK_N / threads registers of a thread,
# 64 for 128 x 128 and 8 warps, about as many as addresses and operands on their way; the exact float32 product of three
# tf32 products keeps each operand in two parts, hence the smaller tile. The wide instructions of sm_90 and sm_100 eat
# steps of 64; CDNA has 64 KiB and warps of 64 threads; RDNA multiplies 16 x 16 x 16 out of registers.
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
    """How `tl.dot` multiplies: float32 as `torch.get_float32_matmul_precision` asks, else as it comes."""
    if target_of(device).startswith("gfx"):
        return "ieee"  # its matrix instructions take float32 as it is
    if dtype == torch.float32 and _is_exact():
        return "tf32x3"
    return "tf32"


def _is_exact() -> bool:
    """Whether float32 products are to be exact, by the newer setting where the user has made that one."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # both settings were made
        return _newer_setting() in ("ieee", "none")


def _newer_setting() -> str:
    return str(torch.backends.cuda.matmul.fp32_precision)


def tiles(
    target: str, dtype: torch.dtype, precision: str, rows: int, columns: int, splits: int = 1
) -> tuple[Config, ...]:
    """The table's row, first the largest tile that still fills the machine."""
    family = TILES[family_of(target)]
    kind = "half" if dtype.itemsize == 2 else "tf32" if precision == "tf32" else "exact"
    fills = [tile for tile in family[kind] if tile_count(tile.constants, rows, columns) * splits >= PROGRAMS]
    best = fills[0] if fills else family[kind][-1]
    return (best, *(tile for tile in family[kind] if tile is not best))


def tile_count(constants: Mapping[str, int], rows: int, columns: int) -> int:
    """How many tiles cover `rows x columns`."""
    return -(-rows // constants["BLOCK_M"]) * -(-columns // constants["BLOCK_N"])


@functools.lru_cache(maxsize=1024)
def most_tiles(target: str, dtype: torch.dtype, precision: str, rows: int, columns: int) -> int:
    """How many tiles cover `rows x columns` by that config of the table's row which needs most."""
    return max(tile_count(tile.constants, rows, columns) for tile in tiles(target, dtype, precision, rows, columns))

"""The precision to train in on a device, and TF32 for products that stay in float32."""

from __future__ import annotations

import os
from typing import Literal

import torch

from mmmae_kernels.gpu import architecture


def best_precision(device: torch.device) -> Literal["32", "bf16"]:
    """Return the precision that `auto` stands for: `bf16` on GPUs with matrix units for bfloat16, `32` elsewhere.

    These GPUs are NVIDIA's from compute capability 8.0 on, and AMD's that the Triton kernels are compiled for.
    """
    return "bf16" if _has_matrix_units(device) else "32"


def use_tf32(device: torch.device) -> bool:
    """Let the matrix units of an NVIDIA GPU multiply float32 matrices, with factors rounded to TF32.

    TF32 has the range of float32 and the 10 bits of float16; products are summed in float32. The GPU multiplies about
    eight times as fast as with exact factors. This is the setting `torch.set_float32_matmul_precision("high")` of the
    whole process; the kernels of this package follow it too.

    Returns:
        Whether the setting was made: False with MMMAE_TF32=0, and on devices without such units.
    """
    if not _has_tf32(device) or _is_exact():
        return False
    torch.set_float32_matmul_precision("high")
    return True


def describe_precision(device: torch.device) -> str:
    """Return in words what `auto` is on a device, and how float32 matrices are multiplied there."""
    automatic = f"precision auto is {best_precision(device)}"
    if not _has_tf32(device):
        return automatic
    return f"{automatic}; precision 32 multiplies " + ("exactly" if _is_exact() else "in TF32")


def _is_exact() -> bool:
    return os.environ.get("MMMAE_TF32") == "0"


def _has_matrix_units(device: torch.device) -> bool:
    return device.type == "cuda" and architecture.refuses(architecture.target_of(device)) is None


def _has_tf32(device: torch.device) -> bool:
    return _has_matrix_units(device) and torch.version.hip is None

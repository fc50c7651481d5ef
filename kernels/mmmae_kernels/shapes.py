"""Shapes and dtypes for ahead-of-time compilation: those of the preset `base`."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Nothing is computed. The batch decides how many programs there are, and with that which tiles.
BATCH, TOKENS, KEEP, WIDTH, DECODER_WIDTH, HIDDEN = 8, 784, 196, 768, 512, 768
BANDS, SIZE, PATCH = 12, 224, (3, 16, 16)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor."""
    return torch.empty(shape, dtype=dtype)


def token_ids(count: int) -> Tensor:
    """Return token numbers `[BATCH, count]`."""
    return torch.arange(count).expand(BATCH, count).contiguous()


def volumes(dtype: torch.dtype) -> list[Tensor]:
    """Return volumes in the dtype of parameters and, for half dtypes, in those that the kernels convert."""
    converted = {torch.float16: [torch.float32, torch.int16], torch.bfloat16: [torch.uint8]}
    types = [parameter_dtype(dtype), *converted.get(dtype, [])]
    return [torch.empty(BATCH, 1, BANDS, SIZE, SIZE, dtype=volume_dtype) for volume_dtype in types]


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of parameters and of the residual stream beside matrix products in `dtype`.

    bfloat16 is compiled as autocast uses it, beside float32; float16 stands for models of one half dtype throughout.
    """
    return torch.float32 if dtype == torch.bfloat16 else dtype


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the values of `torch.set_float32_matmul_precision` that make a difference for a dtype."""
    return ("highest", "high") if dtype == torch.float32 else ("highest",)

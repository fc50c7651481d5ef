"""The shapes and types that kernels are compiled for where there is no GPU: those of the preset `base`."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Nothing is computed with these, so the batch is small.
BATCH, TOKENS, KEEP, WIDTH, DECODER_WIDTH, HIDDEN = 2, 784, 196, 768, 512, 768
BANDS, SIZE, PATCH = 12, 224, (3, 16, 16)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return memory of this shape."""
    return torch.empty(shape, dtype=dtype)


def token_ids(count: int) -> Tensor:
    """Return token numbers `[BATCH, count]`."""
    return torch.arange(count).expand(BATCH, count).contiguous()


def volumes(dtype: torch.dtype) -> list[Tensor]:
    """Return volumes in the type of a weight; for half types also in those that are converted on the way."""
    converted = {torch.float16: [torch.float32, torch.int16], torch.bfloat16: [torch.float32, torch.uint8]}
    types = [dtype, *converted.get(dtype, [])]
    return [torch.empty(BATCH, 1, BANDS, SIZE, SIZE, dtype=volume_dtype) for volume_dtype in types]


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """Return how exactly products of a type may be asked for."""
    return ("highest", "high") if dtype == torch.float32 else ("highest",)

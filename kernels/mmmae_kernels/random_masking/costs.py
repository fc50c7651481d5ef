"""Costs of the operators of masking."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..shapes import BATCH, KEEP, TOKENS

MACS: dict[str, Callable[..., int]] = {}
WITHOUT_MACS = ("mmmae::philox_noise", "mmmae::random_masking")
LAUNCHES: dict[str, Callable[..., int]] = {}


def compile_cases(dtype: torch.dtype) -> None:
    """Launch each kernel once for each combination of arguments that compiles to different code."""
    from . import gpu  # imports triton

    if dtype == torch.float32:  # the kernels compute with integers: one dtype is enough
        for tokens in (TOKENS, gpu.LONGEST_ROW, gpu.LONGEST_ROW + 1):
            gpu.random_masking_forward(BATCH, tokens, KEEP, torch.tensor(0), torch.device("cpu"), 0)


COMPILED: dict[str, Callable[[torch.dtype], None]] = {"random_masking": compile_cases}

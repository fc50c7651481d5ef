"""Costs of the operators of GELU; a second kernel adds up the bias gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..shapes import BATCH, HIDDEN, KEEP, empty, parameter_dtype

MACS: dict[str, Callable[..., int]] = {}
WITHOUT_MACS = ("mmmae::gelu", "mmmae::gelu_backward")
LAUNCHES: dict[str, Callable[..., int]] = {"mmmae::gelu_backward": lambda *arguments: 1 + (arguments[2] is not None)}


def compile_cases(dtype: torch.dtype) -> None:
    """Launch each kernel once for each combination of arguments that compiles to different code."""
    from . import gpu  # imports triton

    hidden = empty(BATCH * KEEP, HIDDEN, dtype=dtype)
    for bias in (empty(HIDDEN, dtype=parameter_dtype(dtype)), None):
        gpu.gelu_forward(hidden, bias)
        gpu.gelu_backward(hidden.clone(), hidden, bias)


COMPILED: dict[str, Callable[[torch.dtype], None]] = {"gelu_linear": compile_cases}

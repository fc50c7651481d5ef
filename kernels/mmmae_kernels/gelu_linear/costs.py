"""Costs of the operators of GELU, each of which is one kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..shapes import BATCH, HIDDEN, KEEP, empty, parameter_dtype

MACS: dict[str, Callable[..., int]] = {}
WITHOUT_MACS = ("mmmae::gelu", "mmmae::gelu_backward")
LAUNCHES: dict[str, Callable[..., int]] = {}


def compile_cases(dtype: torch.dtype) -> None:
    """Launch each kernel once for each combination of arguments that compiles to different code."""
    from . import gpu  # imports triton

    hidden = empty(BATCH * KEEP, HIDDEN, dtype=dtype)
    for bias in (empty(HIDDEN, dtype=parameter_dtype(dtype)), None):
        _, counters = gpu.gelu_forward(hidden, bias)
        gpu.gelu_backward(hidden.clone(), hidden, bias, counters)


COMPILED: dict[str, Callable[[torch.dtype], None]] = {"gelu_linear": compile_cases}

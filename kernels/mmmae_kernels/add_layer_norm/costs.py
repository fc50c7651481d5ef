"""Costs of the operators of the norm; backward is two kernels, the second of which adds up partial sums."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..shapes import BATCH, KEEP, WIDTH, empty

MACS: dict[str, Callable[..., int]] = {}
WITHOUT_MACS = ("mmmae::add_layer_norm", "mmmae::add_layer_norm_backward")
LAUNCHES: dict[str, Callable[..., int]] = {"mmmae::add_layer_norm_backward": lambda *arguments: 2}


def compile_cases(dtype: torch.dtype) -> None:
    """Launch each kernel once for each combination of arguments that compiles to different code."""
    from . import gpu  # imports triton
    from .op import LONGEST_ROW

    weight, bias = empty(WIDTH, dtype=dtype), empty(WIDTH, dtype=dtype)
    rows, statistics = empty(BATCH * KEEP, WIDTH, dtype=dtype), torch.empty(BATCH * KEEP)
    for residual, residual_bias in ((None, None), (rows, None), (rows, bias)):
        gpu.add_layer_norm_forward(rows, residual, residual_bias, weight, bias, 1e-6, dtype)
    for total, again, sums in ((None, None, None), (rows, None, None), (rows, bias, None), (rows, bias, dtype)):
        gpu.add_layer_norm_backward(total, rows, rows, weight, again, statistics, statistics, sums, dtype)
    if dtype != torch.float32:  # as under autocast
        stream, again = empty(BATCH * KEEP, WIDTH, dtype=torch.float32), empty(WIDTH, dtype=torch.float32)
        gpu.add_layer_norm_forward(stream, rows, again, again, again, 1e-6, dtype)
        arguments = (stream, rows, stream, again, again, statistics, statistics, torch.float32, dtype)
        gpu.add_layer_norm_backward(*arguments)
    width = LONGEST_ROW
    longest, weight, statistics = empty(2, width, dtype=dtype), empty(width, dtype=dtype), torch.empty(2)
    gpu.add_layer_norm_forward(longest, longest, weight, weight, weight, 1e-6, dtype)
    arguments = (longest, longest, longest, weight, weight, statistics, statistics, dtype, None)
    gpu.add_layer_norm_backward(*arguments)


COMPILED: dict[str, Callable[[torch.dtype], None]] = {"add_layer_norm": compile_cases}

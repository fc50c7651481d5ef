"""Costs of the operators of the norm, each of which is one kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..gpu.groups import COUNTERS
from ..shapes import BATCH, KEEP, WIDTH, empty

MACS: dict[str, Callable[..., int]] = {}
WITHOUT_MACS = ("mmmae::add_layer_norm", "mmmae::add_layer_norm_backward")
LAUNCHES: dict[str, Callable[..., int]] = {}


def compile_cases(dtype: torch.dtype) -> None:
    """Launch each kernel once for each combination of arguments that compiles to different code."""
    from . import gpu  # imports triton
    from .op import LONGEST_ROW

    if dtype == torch.bfloat16:
        _compile_mixed_cases()
        return
    weight, bias = empty(WIDTH, dtype=dtype), empty(WIDTH, dtype=dtype)
    rows, saved = empty(BATCH * KEEP, WIDTH, dtype=dtype), _saved(BATCH * KEEP)
    for residual, residual_bias in ((None, None), (rows, None), (rows, bias)):
        gpu.add_layer_norm_forward(rows, residual, residual_bias, weight, bias, 1e-6, dtype)
    for total, again, sums in ((None, None, None), (rows, None, None), (rows, bias, None), (rows, bias, dtype)):
        gpu.add_layer_norm_backward(total, rows, rows, weight, again, *saved, sums, dtype)
    width = LONGEST_ROW
    longest, weight = empty(2, width, dtype=dtype), empty(width, dtype=dtype)
    gpu.add_layer_norm_forward(longest, longest, weight, weight, weight, 1e-6, dtype)
    gpu.add_layer_norm_backward(longest, longest, longest, weight, weight, *_saved(2), dtype, None)


def _compile_mixed_cases() -> None:
    """Launch each kernel as training under autocast does: products in bfloat16, stream and parameters in float32."""
    from . import gpu  # imports triton
    from .op import LONGEST_ROW

    half, single = torch.bfloat16, torch.float32
    stream, product, weight = _mixed_inputs(BATCH * KEEP, WIDTH)
    saved = _saved(BATCH * KEEP)
    for x, residual, bias, dtype in (
        (stream, product, weight, half),
        (stream, product, weight, single),
        (stream, product, None, half),
        (stream, None, None, half),
        (stream, None, None, single),
        (product, None, None, half),
        # The stream in bfloat16 too.
        (product, product, None, half),
        (product, product, weight, half),
        (product, product, weight, single),
    ):
        gpu.add_layer_norm_forward(x, residual, bias, weight, weight, 1e-6, dtype)
    for grad_total, grad_norm, total, norm_bias, *dtypes in (
        (stream, product, stream, weight, single, half),
        (stream, product, stream, weight, None, half),
        (stream, product, stream, weight, None, None),
        (None, product, stream, weight, single, half),
        (None, product, stream, weight, None, None),
        (None, product, product, weight, None, None),
        (None, stream, stream, None, single, half),
        (None, stream, stream, None, None, None),
        (product, product, product, weight, None, None),
        (product, product, product, weight, single, None),
        (None, product, product, weight, single, None),
        (None, stream, product, None, single, None),
    ):
        gpu.add_layer_norm_backward(grad_total, grad_norm, total, weight, norm_bias, *saved, *dtypes)
    stream, product, weight = _mixed_inputs(2, LONGEST_ROW)
    gpu.add_layer_norm_forward(stream, product, weight, weight, weight, 1e-6, half)
    gpu.add_layer_norm_backward(stream, product, stream, weight, weight, *_saved(2), single, half)


def _saved(rows: int) -> tuple[Tensor, Tensor]:
    """Return statistics of rows, and counters."""
    return torch.empty(2, rows), torch.zeros(COUNTERS, dtype=torch.int32)


def _mixed_inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a float32 stream, a product, and a weight."""
    stream, product = empty(rows, width, dtype=torch.float32), empty(rows, width, dtype=torch.bfloat16)
    return stream, product, empty(width, dtype=torch.float32)


COMPILED: dict[str, Callable[[torch.dtype], None]] = {"add_layer_norm": compile_cases}

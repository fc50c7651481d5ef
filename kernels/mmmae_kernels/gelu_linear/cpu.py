"""GELU on the CPU, and its gradient with the activation computed again in the same pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor, empty_like, get_num_threads

from ..cpu import library
from ..cpu.library import DTYPES, FLOAT32

_forward = library.function("gelu")
_backward = library.function("gelu_backward")
CONTIGUOUS = torch.contiguous_format


def gelu_forward(hidden: Tensor, hidden_bias: Tensor | None) -> tuple[Tensor, None]:
    """Return `gelu(hidden + hidden_bias)`, the exact GELU, and None for counters.

    Args:
        hidden: `[..., H]`, any strides.
        hidden_bias: `[H]`, or None for zero.
    """
    activated = empty_like(hidden, memory_format=CONTIGUOUS)
    rows, strides, sizes = _rows(hidden)
    if hidden_bias is not None:
        hidden_bias = library.float_vector(hidden_bias)
    bias = 0 if hidden_bias is None else hidden_bias.data_ptr()
    _forward(rows.data_ptr(), strides, bias, activated.data_ptr(), DTYPES[hidden.dtype], sizes, get_num_threads())
    return activated, None


def gelu_backward(
    grad: Tensor, hidden: Tensor, hidden_bias: Tensor | None, counters: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Multiply `grad` in place by `gelu'(hidden + hidden_bias)`; return the activation and the gradient of the bias.

    Args:
        grad: `[..., H]`, contiguous; overwritten.
        hidden: `[..., H]`, any strides.
        hidden_bias: `[H]`, or None for zero; its gradient is then None.
        counters: not used here.

    Raises:
        ValueError: `grad` does not have the shape and dtype of `hidden`, or is not contiguous.
    """
    if grad.shape != hidden.shape or grad.dtype is not hidden.dtype or not grad.is_contiguous():
        raise ValueError(
            f"grad is {grad.dtype} of shape {list(grad.shape)} and strides {list(grad.stride())}, "
            f"expected contiguous {hidden.dtype} of shape {list(hidden.shape)}"
        )
    activated = empty_like(hidden, memory_format=CONTIGUOUS)
    rows, strides, sizes = _rows(hidden)
    shift = grad_bias = None
    if hidden_bias is not None:
        shift = library.float_vector(hidden_bias)
        grad_bias = empty_like(shift)
    _backward(
        grad.data_ptr(),
        rows.data_ptr(),
        strides,
        0 if shift is None else shift.data_ptr(),
        activated.data_ptr(),
        0 if grad_bias is None else grad_bias.data_ptr(),
        DTYPES[hidden.dtype],
        sizes,
        get_num_threads(),
    )
    if grad_bias is not None and hidden_bias is not None and hidden_bias.dtype is not FLOAT32:
        grad_bias = grad_bias.to(hidden_bias.dtype)
    return activated, grad_bias


def _rows(hidden: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int, int]]:
    """Return `hidden` as `[A, B, H]`, the strides of A and B, and the sizes."""
    width = hidden.size(-1)
    if hidden.is_contiguous():
        rows = hidden.numel() // width if width else math.prod(hidden.shape[:-1])
        return hidden, (0, width), (1, rows, width)
    hidden = library.to_three_axes(hidden)
    return hidden, (hidden.stride(0), hidden.stride(1)), (hidden.size(0), hidden.size(1), width)

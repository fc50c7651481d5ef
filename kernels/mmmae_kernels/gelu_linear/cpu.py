"""GELU on the CPU, float32, and its derivative in one pass with the activation that nobody kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu import library


def gelu_forward(hidden: Tensor, hidden_bias: Tensor | None) -> Tensor:
    """`gelu(hidden + hidden_bias)`, the exact GELU.

    Args:
        hidden: `[..., H]`, any strides.
        hidden_bias: `[H]`, or None for zero.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    rows = _rows(hidden)
    activated = torch.empty(rows.shape)
    library.call("gelu", rows, None if hidden_bias is None else library.rows_of(hidden_bias), activated)
    return activated.view(hidden.shape)


def gelu_backward(grad: Tensor, hidden: Tensor, hidden_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Turn `grad` into `grad * gelu'(hidden + hidden_bias)`; give the activation, and the sum of that over rows.

    Args:
        grad: `[..., H]`, contiguous; overwritten.
        hidden: `[..., H]`, any strides.
        hidden_bias: `[H]`, or None for zero: the sum then has no elements.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `grad` is not contiguous.
    """
    rows = _rows(hidden)
    library.check("grad", grad, hidden.shape)
    activated = torch.empty(rows.shape)
    grad_bias = None if hidden_bias is None else torch.empty(rows.shape[-1])
    bias = None if hidden_bias is None else library.rows_of(hidden_bias)
    library.call("gelu_backward", _in_place(grad, rows.shape), rows, bias, activated, grad_bias)
    return activated.view(hidden.shape), hidden.new_empty(0) if grad_bias is None else grad_bias


def _rows(hidden: Tensor) -> Tensor:
    if hidden.dim() == 0:
        raise ValueError("hidden has shape [], expected is [..., H]")
    library.check("hidden", hidden, hidden.shape)
    return library.in_three_axes(hidden)


def _in_place(grad: Tensor, shape: torch.Size) -> Tensor:
    """The same memory in another shape."""
    if not grad.is_contiguous():
        raise ValueError(f"grad has strides {list(grad.stride())}, expected is contiguous memory")
    return grad.detach().view(shape)

"""Residual add and layer norm on the CPU, float32, and their gradients in one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu import library


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (of no elements without residual), its layer norm, and mean and reciprocal deviation of each row.

    Args:
        x, residual: `[..., D]`.
        residual_bias: `[D]`, or None for zero.
        weight, bias: `[D]`.
        epsilon: added to the variance.
        dtype: of the norm, float32.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_rows("x", x)
    if residual is not None:
        library.check("residual", residual, x.shape)
    rows = library.in_three_axes(x)
    norm, mean, rstd = x.new_empty(rows.shape), *(x.new_empty(rows.shape[0] * rows.shape[1]) for _ in range(2))
    total = None if residual is None else torch.empty_like(norm)
    library.call(
        "add_layer_norm",
        rows,
        None if residual is None else library.in_three_axes(residual),
        None if residual_bias is None else library.rows_of(residual_bias),
        library.rows_of(weight),
        library.rows_of(bias),
        epsilon,
        total,
        norm,
        mean,
        rstd,
    )
    return x.new_empty(0) if total is None else total.view(x.shape), norm.view(x.shape), mean, rstd


def add_layer_norm_backward(
    grad_total: Tensor | None,
    grad_norm: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    sum_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of x and residual alike, those of weight and bias, the first's sum over rows, and the norm.

    Args:
        grad_total, grad_norm: of the outputs, `[..., D]` of any strides; None for the sum's means zero.
        total, mean, rstd: what `add_layer_norm_forward` gave.
        weight: `[D]`.
        bias: `[D]` to compute the norm again in the same pass, for whoever did not keep it; None for a norm
            of no elements.
        sum_dtype: float32, or None for a sum over rows of no elements.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_rows("total", total)
    for name, grad in (("grad_total", grad_total), ("grad_norm", grad_norm)):
        if grad is not None:
            library.check(name, grad, total.shape)
    rows = library.in_three_axes(total)
    grad_x, norm = torch.empty(rows.shape), None if bias is None else torch.empty(rows.shape)
    grad_weight, grad_bias = torch.empty(rows.shape[-1]), torch.empty(rows.shape[-1])
    row_sum = None if sum_dtype is None else torch.empty(rows.shape[-1])
    library.call(
        "add_layer_norm_backward",
        None if grad_total is None else library.in_three_axes(grad_total),
        library.in_three_axes(grad_norm),
        rows,
        library.rows_of(weight),
        None if bias is None else library.rows_of(bias),
        library.rows_of(mean),
        library.rows_of(rstd),
        grad_x,
        grad_weight,
        grad_bias,
        row_sum,
        norm,
    )
    norm = total.new_empty(0) if norm is None else norm.view(total.shape)
    return grad_x.view(total.shape), grad_weight, grad_bias, total.new_empty(0) if row_sum is None else row_sum, norm


def _check_rows(name: str, tensor: Tensor) -> None:
    if tensor.dim() == 0:
        raise ValueError(f"{name} has shape [], expected is [..., D]")
    library.check(name, tensor, tensor.shape)

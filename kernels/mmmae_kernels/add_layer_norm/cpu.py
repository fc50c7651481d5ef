"""Residual add and layer norm on the CPU, and their gradients, in one pass each."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, empty_like, get_num_threads

from ..cpu import library
from ..cpu.library import FLOAT32

_forward = library.function("add_layer_norm")
_backward = library.function("add_layer_norm_backward")
CONTIGUOUS = torch.contiguous_format


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor, None]:
    """Return the sum, its layer norm, mean and 1 / standard deviation of each row `[2, ROWS]`, and None for counters.

    Args:
        x, residual: `[..., D]`, any strides. Without residual the returned sum is None.
        residual_bias: `[D]`, or None for zero.
        weight, bias: `[D]`.
        epsilon: added to the variance.
        dtype: dtype of the norm.
    """
    width = weight.numel()
    rows = x.numel() // width if width else math.prod(x.shape[:-1])
    total_dtype, dtypes = _forward_dtypes(x.dtype, x.dtype if residual is None else residual.dtype, dtype)
    norm = empty_like(x, dtype=dtype, memory_format=CONTIGUOUS)
    total = None if residual is None else empty_like(x, dtype=total_dtype, memory_format=CONTIGUOUS)
    weight, bias = library.float_vector(weight), library.float_vector(bias)
    statistics = weight.new_empty(2, rows)  # on the CPU and in float32, whatever the defaults are
    mean = statistics.data_ptr()
    sizes, x_strides, residual_strides = (1, rows, width), (0, width), (0, width)
    if not (x.is_contiguous() and (residual is None or residual.is_contiguous())):
        x = library.to_three_axes(x)
        sizes, x_strides = (x.size(0), x.size(1), width), (x.stride(0), x.stride(1))
        if residual is not None:
            residual = library.to_three_axes(residual)
            residual_strides = residual.stride(0), residual.stride(1)
    if residual_bias is not None:
        residual_bias = library.float_vector(residual_bias)
    _forward(
        x.data_ptr(),
        x_strides,
        0 if residual is None else residual.data_ptr(),
        residual_strides,
        0 if residual_bias is None else residual_bias.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        epsilon,
        0 if total is None else total.data_ptr(),
        norm.data_ptr(),
        mean,
        mean + 4 * rows,
        dtypes,
        sizes,
        get_num_threads(),
    )
    return total, norm, statistics, None


@functools.cache  # asked at every call
def _forward_dtypes(x: torch.dtype, residual: torch.dtype, norm: torch.dtype) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the dtype of the sum, and those that the compiled forward pass takes."""
    total = torch.promote_types(x, residual)
    return total, tuple(library.DTYPES[dtype] for dtype in (x, residual, total, norm))


def add_layer_norm_backward(
    grad_total: Tensor | None,
    grad_norm: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    counters: Tensor | None,
    sum_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, bias and residual_bias, the layer norm computed again, and that of residual.

    Args:
        grad_total, grad_norm: gradients of the outputs, `[..., D]`, any strides; None for `grad_total` means zero.
        total, statistics: outputs of `add_layer_norm_forward`.
        weight: `[D]`.
        bias: `[D]` to compute the norm again in the same pass; None returns None for it.
        counters: not used here.
        sum_dtype: dtype of the gradient of residual_bias; None returns None for it.
        residual_dtype: dtype of the gradient of residual; None or the dtype of `total` returns None, as that of x is
            the same.
    """
    width = weight.numel()
    grad_x = empty_like(total, memory_format=CONTIGUOUS)
    total_dtype = total.dtype
    is_same = residual_dtype is None or residual_dtype is total_dtype
    grad_residual = None if is_same else empty_like(total, dtype=residual_dtype, memory_format=CONTIGUOUS)
    norm = None if bias is None else empty_like(grad_norm, memory_format=CONTIGUOUS)
    grad_total_dtype = total_dtype if grad_total is None else grad_total.dtype
    dtypes = _backward_dtypes(grad_total_dtype, grad_norm.dtype, total_dtype, residual_dtype or total_dtype)
    weight_dtype, weight = weight.dtype, library.float_vector(weight)
    grad_weight, grad_bias = empty_like(weight), empty_like(weight)
    row_sum = None if sum_dtype is None else empty_like(weight)
    rows, mean = statistics.size(1), statistics.data_ptr()
    sizes, strides = (1, rows, width), (0, width)
    grad_total_strides = grad_norm_strides = total_strides = strides
    if not (total.is_contiguous() and grad_norm.is_contiguous() and (grad_total is None or grad_total.is_contiguous())):
        total, grad_norm = library.to_three_axes(total), library.to_three_axes(grad_norm)
        sizes = total.size(0), total.size(1), width
        total_strides = total.stride(0), total.stride(1)
        grad_norm_strides = grad_norm.stride(0), grad_norm.stride(1)
        if grad_total is not None:
            grad_total = library.to_three_axes(grad_total)
            grad_total_strides = grad_total.stride(0), grad_total.stride(1)
    if bias is not None:
        bias = library.float_vector(bias)
    _backward(
        0 if grad_total is None else grad_total.data_ptr(),
        grad_total_strides,
        grad_norm.data_ptr(),
        grad_norm_strides,
        total.data_ptr(),
        total_strides,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        mean,
        mean + 4 * rows,
        grad_x.data_ptr(),
        0 if grad_residual is None else grad_residual.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        0 if row_sum is None else row_sum.data_ptr(),
        0 if norm is None else norm.data_ptr(),
        dtypes,
        sizes,
        get_num_threads(),
    )
    if weight_dtype is not FLOAT32:
        grad_weight, grad_bias = grad_weight.to(weight_dtype), grad_bias.to(weight_dtype)
    if row_sum is not None and sum_dtype is not FLOAT32:
        row_sum = row_sum.to(sum_dtype)
    return grad_x, grad_weight, grad_bias, row_sum, norm, grad_residual


@functools.cache
def _backward_dtypes(*dtypes: torch.dtype) -> tuple[int, ...]:
    return tuple(library.DTYPES[dtype] for dtype in dtypes)

"""Residual add and layer norm on the GPU; a row stays in registers from the first load to the last store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.config import Launch, row_config
from ..gpu.launch import launch
from ..gpu.partial_sums import sum_partials

PROGRAMS = 1024  # upper limit in backward, enough for any GPU
ROWS = 8  # lower limit of rows a program in backward: its partial sums are then a fraction of what it writes


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum (empty without residual), the norm in `dtype`, and mean and 1 / standard deviation `[ROWS]`.

    One launch.
    """
    shape, total_dtype = x.shape, x.dtype
    width = shape[-1]
    rows = x.numel() // width if width else 0
    if residual is None:
        total = x.new_empty(0)
    else:
        if residual.dtype != total_dtype:
            total_dtype = torch.promote_types(total_dtype, residual.dtype)
        total = x.new_empty(*shape, dtype=total_dtype)
    norm = x.new_empty(*shape, dtype=dtype)
    mean = x.new_empty(rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    x, stride_x = _rows(x, width)
    residual, stride_residual = (None, 0) if residual is None else _rows(residual, width)
    tensors = (
        norm,
        None if residual is None else total,
        mean,
        rstd,
        x,
        residual,
        None if residual_bias is None else residual_bias.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
    )
    launch(_describe_forward, tensors, (rows, width, float(epsilon), stride_x, stride_residual))
    return total, norm, mean, rstd


def add_layer_norm_backward(
    grad_total: Tensor | None,
    grad_norm: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    sum_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight, bias and residual_bias, the layer norm computed again, and that of residual.

    The gradient of residual_bias has dtype `sum_dtype` and is empty if that is None. The norm has the dtype of its
    gradient and is empty without `bias`. The gradient of residual is that of x rounded to `residual_dtype`; None if
    that is None or the dtype of `total`. Two launches; deterministic.
    """
    shape = total.shape
    width = shape[-1]
    rows = total.numel() // width if width else 0
    grad_x = total.new_empty(*shape)
    grad_residual = None
    if residual_dtype is not None and residual_dtype != total.dtype:
        grad_residual = total.new_empty(*shape, dtype=residual_dtype)
    norm = grad_norm.new_empty(0) if bias is None else grad_norm.new_empty(*shape)
    rows_per_program = max(ROWS, -(-rows // PROGRAMS))
    programs = -(-rows // rows_per_program)
    sums = [weight.new_empty(width), weight.new_empty(width)]
    if sum_dtype is not None:
        sums.append(weight.new_empty(width, dtype=sum_dtype))
    partials = total.new_empty(programs, len(sums), width, dtype=torch.float32)
    total, stride_total = _rows(total, width)
    grad_norm, stride_grad_norm = _rows(grad_norm, width)
    grad_total, stride_grad_total = (None, 0) if grad_total is None else _rows(grad_total, width)
    tensors = (
        grad_x,
        grad_residual,
        partials,
        None if bias is None else norm,
        grad_total,
        grad_norm,
        total,
        mean,
        rstd,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )
    numbers = rows, width, rows_per_program, stride_grad_total, stride_grad_norm, stride_total, len(sums)
    launch(_describe_backward, tensors, numbers)
    sum_partials(partials, sums)
    row_sum = grad_x.new_empty(0) if sum_dtype is None else sums[2]
    return grad_x, sums[0], sums[1], row_sum, norm, grad_residual


def _rows(tensor: Tensor, width: int) -> tuple[Tensor, int]:
    """Return a tensor as rows of adjacent channels, and the stride of the rows; copies only if the layout needs it."""
    if tensor.is_contiguous():
        return tensor, width
    flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    if flat.stride(1) != 1 and width != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def _describe_forward(
    target: str, rows: int, width: int, epsilon: float, stride_x: int, stride_residual: int
) -> Launch:
    arguments = {"D": width, "epsilon": epsilon, "stride_x": stride_x, "stride_residual": stride_residual}
    return Launch(_add_layer_norm_forward, lambda c: (rows,), arguments, (row_config(width, target),))


def _describe_backward(
    target: str,
    rows: int,
    width: int,
    rows_per_program: int,
    stride_grad_total: int,
    stride_grad_norm: int,
    stride_total: int,
    sums: int,
) -> Launch:
    arguments = {
        "ROWS": rows,
        "D": width,
        "rows_per_program": rows_per_program,
        "stride_grad_total": stride_grad_total,
        "stride_grad_norm": stride_grad_norm,
        "stride_total": stride_total,
        "SUMS": sums,
    }
    # A thread holds 8 numbers of each of eight rows, and addresses: more than the 64 registers of full occupancy. With
    # fewer than 128 some of the combinations of dtypes under autocast would spill.
    config = row_config(width, target)._replace(registers=128)
    return Launch(_add_layer_norm_backward, lambda c: (triton.cdiv(rows, rows_per_program),), arguments, (config,))


@triton.jit
def _add_layer_norm_forward(
    norm_ptr,          # [ROWS, D]
    total_ptr,         # [ROWS, D], or None without residual
    mean_ptr,          # [ROWS] float32
    rstd_ptr,          # [ROWS] float32, 1 / standard deviation
    x_ptr,             # [ROWS, D]
    residual_ptr,      # [ROWS, D] or None
    residual_bias_ptr,  # [D] or None
    weight_ptr,        # [D]
    bias_ptr,          # [D]
    D, epsilon,
    stride_x, stride_residual,  # between rows
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    has_channel = d < D
    total = tl.load(x_ptr + row * stride_x + d, mask=has_channel, other=0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * stride_residual + d, mask=has_channel, other=0).to(tl.float32)
        if residual_bias_ptr is not None:
            residual += tl.load(residual_bias_ptr + d, mask=has_channel, other=0)
        total = total.to(tl.float32) + residual
        # The statistics are of the sum as it is stored, so that backward computes with the same values.
        total = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * D + d, total, mask=has_channel)
    total = total.to(tl.float32)
    mean = tl.sum(total) / D
    centred = tl.where(has_channel, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred) / D + epsilon)
    weight = tl.load(weight_ptr + d, mask=has_channel, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=has_channel, other=0).to(tl.float32)
    norm = centred * rstd * weight + bias
    tl.store(norm_ptr + row * D + d, norm.to(norm_ptr.dtype.element_ty), mask=has_channel)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _add_layer_norm_backward(
    grad_x_ptr,        # [ROWS, D]
    grad_residual_ptr,  # [ROWS, D] the same in another dtype, or None
    partial_ptr,       # [programs, SUMS, D] each program's sums: gradients of weight, bias and, if 3, residual_bias
    norm_ptr,          # [ROWS, D] the norm computed again, or None
    grad_total_ptr,    # [ROWS, D] or None
    grad_norm_ptr,     # [ROWS, D]
    total_ptr,         # [ROWS, D]
    mean_ptr,          # [ROWS]
    rstd_ptr,          # [ROWS]
    weight_ptr,        # [D]
    bias_ptr,          # [D], or None if norm_ptr is
    ROWS, D,
    rows_per_program,
    stride_grad_total, stride_grad_norm, stride_total,  # between rows
    SUMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    has_channel = d < D
    weight = tl.load(weight_ptr + d, mask=has_channel, other=0).to(tl.float32)
    if norm_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=has_channel, other=0).to(tl.float32)
    weight_sum, bias_sum = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    row_sum = tl.zeros((BLOCK_D,), tl.float32)
    for place in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, ROWS)):
        row = tl.cast(place, tl.int64)
        total = tl.load(total_ptr + row * stride_total + d, mask=has_channel, other=0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        unit = tl.where(has_channel, (total - tl.load(mean_ptr + row)) * rstd, 0.0)
        if norm_ptr is not None:
            norm = (unit * weight + bias).to(norm_ptr.dtype.element_ty)
            tl.store(norm_ptr + row * D + d, norm, mask=has_channel)
        grad_norm = tl.load(grad_norm_ptr + row * stride_grad_norm + d, mask=has_channel, other=0).to(tl.float32)
        weight_sum += grad_norm * unit
        bias_sum += grad_norm
        grad_unit = grad_norm * weight
        # Ba et al., "Layer normalization", 2016: subtract the components along the mean and along the row itself.
        grad_x = (grad_unit - (tl.sum(grad_unit) + unit * tl.sum(grad_unit * unit)) / D) * rstd
        if grad_total_ptr is not None:
            grad_x += tl.load(grad_total_ptr + row * stride_grad_total + d, mask=has_channel, other=0).to(tl.float32)
        if SUMS == 3:
            row_sum += grad_x
        tl.store(grad_x_ptr + row * D + d, grad_x.to(grad_x_ptr.dtype.element_ty), mask=has_channel)
        if grad_residual_ptr is not None:
            grad_residual = grad_x.to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + row * D + d, grad_residual, mask=has_channel)
    partial_at = partial_ptr + program.to(tl.int64) * SUMS * D + d
    tl.store(partial_at, weight_sum, mask=has_channel)
    tl.store(partial_at + D, bias_sum, mask=has_channel)
    if SUMS == 3:
        tl.store(partial_at + 2 * D, row_sum, mask=has_channel)

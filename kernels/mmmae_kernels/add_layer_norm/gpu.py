"""Residual add and layer norm on the GPU: a row stays in registers between the two, and backward between all four."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.launch import launch, row_config
from ..gpu.partial_sums import sum_partials

PROGRAMS = 1024  # at most, of backward: enough for any GPU
ROWS = 8  # at least, of a program of backward: its partial sums are then a fraction of what it writes


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum (no elements without residual), norm in `dtype`, mean and 1 / standard deviation `[ROWS]`, in one launch."""
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    total_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = torch.empty((0,) if residual is None else x.shape, dtype=total_dtype, device=x.device)
    norm = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    x = _rows(x)
    residual = None if residual is None else _rows(residual)
    arguments = {
        "total_ptr": None if residual is None else total,
        "norm_ptr": norm,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "x_ptr": x,
        "residual_ptr": residual,
        "residual_bias_ptr": None if residual_bias is None else residual_bias.contiguous(),
        "weight_ptr": weight.contiguous(),
        "bias_ptr": bias.contiguous(),
        "D": width,
        "epsilon": epsilon,
        "stride_x": x.stride(0),
        "stride_residual": 0 if residual is None else residual.stride(0),
    }
    launch(_add_layer_norm_forward, lambda c: (rows,), arguments, (row_config(width, x.device),))
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the sum, weight and bias, the first's sum over rows in `sum_dtype`, and the norm again.

    The sum over rows has no elements where that type is None; the norm has its gradient's type, and no elements without
    `bias`. Two launches; deterministic.
    """
    width = total.shape[-1]
    rows = total.numel() // width if width else 0
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    norm = torch.empty((0,) if bias is None else total.shape, dtype=grad_norm.dtype, device=total.device)
    rows_per_program = max(ROWS, triton.cdiv(rows, PROGRAMS))
    programs = triton.cdiv(rows, rows_per_program)
    sums = [torch.empty_like(weight, memory_format=torch.contiguous_format) for _ in range(2)]
    if sum_dtype is not None:
        sums.append(torch.empty_like(sums[0], dtype=sum_dtype))
    partials = torch.empty(programs, len(sums), width, dtype=torch.float32, device=total.device)
    total, grad_norm = _rows(total), _rows(grad_norm)
    grad_total = None if grad_total is None else _rows(grad_total)
    arguments = {
        "grad_x_ptr": grad_x,
        "partial_ptr": partials,
        "norm_ptr": None if bias is None else norm,
        "grad_total_ptr": grad_total,
        "grad_norm_ptr": grad_norm,
        "total_ptr": total,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "weight_ptr": weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "ROWS": rows,
        "D": width,
        "rows_per_program": rows_per_program,
        "stride_grad_total": 0 if grad_total is None else grad_total.stride(0),
        "stride_grad_norm": grad_norm.stride(0),
        "stride_total": total.stride(0),
        "SUMS": len(sums),
    }
    # Eight rows of 8 numbers a thread, and addresses: more than the 64 registers that let the most blocks run.
    config = row_config(width, total.device)._replace(registers=96)
    launch(_add_layer_norm_backward, lambda c: (programs,), arguments, (config,))
    sum_partials(partials, sums)
    row_sum = grad_x.new_empty(0) if sum_dtype is None else sums[2]
    return grad_x, sums[0], sums[1], row_sum, norm


def _rows(tensor: Tensor) -> Tensor:
    """As `[ROWS, D]` with neighbouring channels; a copy only where the layout allows no such view."""
    flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


@triton.jit
def _add_layer_norm_forward(
    total_ptr,         # [ROWS, D], or None without residual
    norm_ptr,          # [ROWS, D]
    mean_ptr,          # [ROWS] float32
    rstd_ptr,          # [ROWS] float32, 1 / standard deviation
    x_ptr,             # [ROWS, D]
    residual_ptr,      # [ROWS, D] or None
    residual_bias_ptr,  # [D] or None
    weight_ptr,        # [D]
    bias_ptr,          # [D]
    D, epsilon,
    stride_x, stride_residual,  # of a row
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
        # The statistics are those of the sum as it is kept, so that backward finds the same.
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
    partial_ptr,       # [programs, SUMS, D] sums of its rows' gradients by weight, bias and perhaps the sum
    norm_ptr,          # [ROWS, D] the norm again, or None
    grad_total_ptr,    # [ROWS, D] or None
    grad_norm_ptr,     # [ROWS, D]
    total_ptr,         # [ROWS, D]
    mean_ptr,          # [ROWS]
    rstd_ptr,          # [ROWS]
    weight_ptr,        # [D]
    bias_ptr,          # [D], or None where the norm is not asked for
    ROWS, D,
    rows_per_program,
    stride_grad_total, stride_grad_norm, stride_total,  # of a row
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
        # Ba et al., "Layer normalization", 2016: the parts along the mean and along the row itself drop out.
        grad_x = (grad_unit - (tl.sum(grad_unit) + unit * tl.sum(grad_unit * unit)) / D) * rstd
        if grad_total_ptr is not None:
            grad_x += tl.load(grad_total_ptr + row * stride_grad_total + d, mask=has_channel, other=0).to(tl.float32)
        if SUMS == 3:
            row_sum += grad_x
        tl.store(grad_x_ptr + row * D + d, grad_x.to(grad_x_ptr.dtype.element_ty), mask=has_channel)
    partial_at = partial_ptr + program.to(tl.int64) * SUMS * D + d
    tl.store(partial_at, weight_sum, mask=has_channel)
    tl.store(partial_at + D, bias_sum, mask=has_channel)
    if SUMS == 3:
        tl.store(partial_at + 2 * D, row_sum, mask=has_channel)

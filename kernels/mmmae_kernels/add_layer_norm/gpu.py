"""Residual add and layer norm on the GPU; a row stays in registers from the first load to the last store."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.config import Launch, element_config, next_power_of_2
from ..gpu.groups import COUNTERS, GROUP, TILE, rows_of_a_program, stacked
from ..gpu.launch import launch
from ..gpu.partial_sums import end_sums

PROGRAMS = 8192  # in forward, from which on a program takes several rows: one or two times what large GPUs hold
MOST_ROWS = 8  # of a program in forward


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return the sum (None without residual), the norm in `dtype`, the statistics, and counters for backward.

    The statistics are mean and 1 / standard deviation `[2, ROWS]`. One launch.

    Weight and biases may be stacks `[W, D]`: then the first of W equal parts of the rows has the first ones, and so on.
    """
    shape = x.shape
    width, weights = shape[-1], stacked(weight)
    rows = x.numel() // width if width else 0
    total = None
    if residual is not None:
        dtypes = x.dtype, residual.dtype
        total_dtype = dtypes[0] if dtypes[0] == dtypes[1] else torch.promote_types(*dtypes)
        total = x.new_empty(*shape, dtype=total_dtype)
    norm = x.new_empty(*shape, dtype=dtype)
    statistics = x.new_empty(2, rows, dtype=torch.float32)
    counters = x.new_empty(weights * COUNTERS, dtype=torch.int32)
    x, stride_x = _rows(x, width)
    residual, stride_residual = (None, 0) if residual is None else _rows(residual, width)
    tensors = (
        norm,
        total,
        statistics,
        counters,
        x,
        residual,
        None if residual_bias is None else residual_bias.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
    )
    launch(_describe_forward, tensors, (rows, weights, width, float(epsilon), stride_x, stride_residual))
    return total, norm, statistics, counters


def add_layer_norm_backward(
    grad_total: Tensor | None,
    grad_norm: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    counters: Tensor,
    sum_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, bias and residual_bias, the layer norm computed again, and that of residual.

    The gradient of residual_bias has dtype `sum_dtype` and is None if that is. The norm has the dtype of its gradient
    and is None without `bias`. The gradient of residual is that of x rounded to `residual_dtype`; None if that is None
    or the dtype of `total`. One launch; deterministic. For stacks of weights see `add_layer_norm_forward`.
    """
    shape = total.shape
    width, weights = shape[-1], stacked(weight)
    rows = total.numel() // width if width else 0
    rows_per_program, programs = _programs(rows, weights, width)
    new_sum = weight.new_empty if rows else weight.new_zeros  # without rows nothing is launched
    grad_x = total.new_empty(*shape)
    grad_residual = None
    if residual_dtype is not None and residual_dtype != total.dtype:
        grad_residual = total.new_empty(*shape, dtype=residual_dtype)
    norm = None if bias is None else grad_norm.new_empty(*shape)
    grad_weight, grad_bias = new_sum(weight.shape), new_sum(weight.shape)
    row_sum = None if sum_dtype is None else new_sum(weight.shape, dtype=sum_dtype)
    sums = 2 if row_sum is None else 3
    partials = total.new_empty(weights, programs, sums, width, dtype=torch.float32)
    total, stride_total = _rows(total, width)
    grad_norm, stride_grad_norm = _rows(grad_norm, width)
    grad_total, stride_grad_total = (None, 0) if grad_total is None else _rows(grad_total, width)
    tensors = (
        grad_x,
        grad_residual,
        grad_weight,
        grad_bias,
        row_sum,
        norm,
        partials,
        counters,
        grad_total,
        grad_norm,
        total,
        statistics,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )
    strides = stride_grad_total, stride_grad_norm, stride_total
    launch(_describe_backward, tensors, (rows, weights, width, rows_per_program, programs, *strides, sums))
    return grad_x, grad_weight, grad_bias, row_sum, norm, grad_residual


@functools.lru_cache(maxsize=4096)
def _programs(rows: int, weights: int, width: int) -> tuple[int, int]:
    """Return the rows of a program in backward, and the number of programs for each weight."""
    rows_per_program = rows_of_a_program(rows, _rows_together(width))
    return rows_per_program, -(-(rows // weights) // rows_per_program)


def _rows_together(width: int) -> int:
    """Return how many rows a program has in registers at once in backward."""
    return max(1, min(32, TILE // next_power_of_2(width)))


def _rows(tensor: Tensor, width: int) -> tuple[Tensor, int]:
    """Return a tensor as rows of adjacent channels, and the stride of the rows; copies only if the layout needs it."""
    if tensor.is_contiguous():
        return tensor, width
    flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    if flat.stride(1) != 1 and width != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def _describe_forward(
    target: str, rows: int, weights: int, width: int, epsilon: float, stride_x: int, stride_residual: int
) -> Launch:
    rows_of_weight = rows // weights
    rows_per_program = max(1, min(MOST_ROWS, rows // PROGRAMS))
    arguments = {
        "ROWS": rows_of_weight,
        "D": width,
        "epsilon": epsilon,
        "rows_per_program": rows_per_program,
        "stride_x": stride_x,
        "stride_residual": stride_residual,
        "COUNTERS": COUNTERS,
    }
    # Up to 32 channels a thread: up to 1024 channels a row is then held by one warp, which waits for no other.
    block = next_power_of_2(width)
    # Without a limit ptxas spills a few registers on sm_100, so that one more program fits on a multiprocessor.
    config = element_config({"BLOCK_D": block}, block // 4, target)._replace(registers=128)
    programs = triton.cdiv(rows_of_weight, rows_per_program)
    return Launch(_add_layer_norm_forward, lambda c: (programs, weights), arguments, (config,))


def _describe_backward(
    target: str,
    rows: int,
    weights: int,
    width: int,
    rows_per_program: int,
    programs: int,
    stride_grad_total: int,
    stride_grad_norm: int,
    stride_total: int,
    sums: int,
) -> Launch:
    arguments = {
        "ROWS": rows // weights,
        "D": width,
        "rows_per_program": rows_per_program,
        "stride_grad_total": stride_grad_total,
        "stride_grad_norm": stride_grad_norm,
        "stride_total": stride_total,
        "SUMS": sums,
    }
    together, block = _rows_together(width), next_power_of_2(width)
    constants = {"BLOCK_R": together, "BLOCK_D": block, "GROUP": GROUP}
    # A thread holds 8 numbers of each of a dozen tiles, those asked for early included, and addresses.
    config = element_config(constants, together * block, target)._replace(registers=128)
    return Launch(_add_layer_norm_backward, lambda c: (programs, weights), arguments, (config,))


@triton.jit
def _add_layer_norm_forward(
    norm_ptr,          # [W*ROWS, D]
    total_ptr,         # [W*ROWS, D], or None without residual
    statistics_ptr,    # [2, W*ROWS] float32, mean and 1 / standard deviation
    counter_ptr,       # [W, COUNTERS] int32, zeroed for backward
    x_ptr,             # [W*ROWS, D]
    residual_ptr,      # [W*ROWS, D] or None
    residual_bias_ptr,  # [W, D] or None
    weight_ptr,        # [W, D]
    bias_ptr,          # [W, D]
    ROWS, D, epsilon,
    rows_per_program,
    stride_x, stride_residual,  # between rows
    COUNTERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    which = tl.program_id(1)
    first = which * ROWS + tl.program_id(0) * rows_per_program
    end = tl.minimum(first + rows_per_program, (which + 1) * ROWS)
    d = tl.arange(0, BLOCK_D)
    has_channel = d < D
    for number in range(first, end):
        row = tl.cast(number, tl.int64)
        total = tl.load(x_ptr + row * stride_x + d, mask=has_channel, other=0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + row * stride_residual + d, mask=has_channel, other=0).to(tl.float32)
            if residual_bias_ptr is not None:
                residual += tl.load(residual_bias_ptr + which * D + d, mask=has_channel, other=0)
            total = total.to(tl.float32) + residual
            # The statistics are of the sum as it is stored, so that backward computes with the same values.
            total = total.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * D + d, total, mask=has_channel)
        total = total.to(tl.float32)
        mean = tl.sum(total) / D
        centred = tl.where(has_channel, total - mean, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred) / D + epsilon)
        # Read for each row, from the multiprocessor's own cache: registers hold more rows at once instead.
        weight = tl.load(weight_ptr + which * D + d, mask=has_channel, other=0).to(tl.float32)
        bias = tl.load(bias_ptr + which * D + d, mask=has_channel, other=0).to(tl.float32)
        norm = centred * rstd * weight + bias
        tl.store(norm_ptr + row * D + d, norm.to(norm_ptr.dtype.element_ty), mask=has_channel)
        tl.store(statistics_ptr + row, mean)
        tl.store(statistics_ptr + tl.num_programs(1) * ROWS + row, rstd)
    if tl.program_id(0) == 0:
        tl.store(counter_ptr + which * COUNTERS + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), tl.int32))


@triton.jit
def _add_layer_norm_backward(
    grad_x_ptr,        # [W*ROWS, D]
    grad_residual_ptr,  # [W*ROWS, D] the same in another dtype, or None
    grad_weight_ptr,   # [W, D]
    grad_bias_ptr,     # [W, D]
    row_sum_ptr,       # [W, D] gradient of residual_bias, or None
    norm_ptr,          # [W*ROWS, D] the norm computed again, or None
    partial_ptr,       # [W, programs, SUMS, D] float32, each program's part of these sums
    counter_ptr,       # [W, 2*GROUP] int32
    grad_total_ptr,    # [W*ROWS, D] or None
    grad_norm_ptr,     # [W*ROWS, D]
    total_ptr,         # [W*ROWS, D]
    statistics_ptr,    # [2, W*ROWS]
    weight_ptr,        # [W, D]
    bias_ptr,          # [W, D], or None if norm_ptr is
    ROWS, D,
    rows_per_program,
    stride_grad_total, stride_grad_norm, stride_total,  # between rows
    SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    which = tl.program_id(1)
    first = which * ROWS + tl.program_id(0) * rows_per_program
    end = tl.minimum(first + rows_per_program, (which + 1) * ROWS)
    d = tl.arange(0, BLOCK_D)
    has_channel = d < D
    weight = tl.load(weight_ptr + which * D + d, mask=has_channel, other=0).to(tl.float32)[None, :]
    if norm_ptr is not None:
        bias = tl.load(bias_ptr + which * D + d, mask=has_channel, other=0).to(tl.float32)[None, :]
    weight_sum, bias_sum = tl.zeros((BLOCK_R, BLOCK_D), tl.float32), tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    next_total = _load_rows(total_ptr, first, end, stride_total, d, D, BLOCK_R)
    next_grad_norm = _load_rows(grad_norm_ptr, first, end, stride_grad_norm, d, D, BLOCK_R)
    for start in range(first, end, BLOCK_R):
        total, grad_norm = next_total.to(tl.float32), next_grad_norm.to(tl.float32)
        if grad_total_ptr is not None:
            grad_total = _load_rows(grad_total_ptr, start, end, stride_grad_total, d, D, BLOCK_R)
        # What the next rows begin with is asked for before these are computed.
        next_total = _load_rows(total_ptr, start + BLOCK_R, end, stride_total, d, D, BLOCK_R)
        next_grad_norm = _load_rows(grad_norm_ptr, start + BLOCK_R, end, stride_grad_norm, d, D, BLOCK_R)
        row = start + tl.arange(0, BLOCK_R)
        has_row = row < end
        place, mask = row.to(tl.int64)[:, None] * D + d[None, :], has_row[:, None] & has_channel[None, :]
        mean = tl.load(statistics_ptr + row, mask=has_row, other=0)
        rstd = tl.load(statistics_ptr + tl.num_programs(1) * ROWS + row, mask=has_row, other=0)[:, None]
        unit = tl.where(mask, (total - mean[:, None]) * rstd, 0.0)
        if norm_ptr is not None:
            tl.store(norm_ptr + place, (unit * weight + bias).to(norm_ptr.dtype.element_ty), mask=mask)
        weight_sum += grad_norm * unit
        bias_sum += grad_norm
        grad_unit = grad_norm * weight
        # Ba et al., "Layer normalization", 2016: subtract the components along the mean and along the row itself.
        along_mean, along_row = tl.sum(grad_unit, axis=1)[:, None], tl.sum(grad_unit * unit, axis=1)[:, None]
        grad_x = (grad_unit - (along_mean + unit * along_row) / D) * rstd
        if grad_total_ptr is not None:
            grad_x += grad_total.to(tl.float32)
        if SUMS == 3:
            row_sum += grad_x
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + place, grad_x.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    partial_ptr += tl.cast(which, tl.int64) * tl.num_programs(0) * SUMS * D
    partial_at = partial_ptr + tl.program_id(0).to(tl.int64) * SUMS * D + d
    tl.store(partial_at, tl.sum(weight_sum, axis=0), mask=has_channel)
    tl.store(partial_at + D, tl.sum(bias_sum, axis=0), mask=has_channel)
    if SUMS == 3:
        tl.store(partial_at + 2 * D, tl.sum(row_sum, axis=0), mask=has_channel)
        row_sum_ptr += which * D
    end_sums(
        grad_weight_ptr + which * D, grad_bias_ptr + which * D, row_sum_ptr,
        partial_ptr, counter_ptr + which * 2 * GROUP, D, d, has_channel, SUMS, GROUP,
    )


@triton.jit
def _load_rows(pointer, start, end, stride, d, D, BLOCK_R: tl.constexpr):
    """Return BLOCK_R rows from `start` on, zero outside of rows before `end` and channels before D."""
    row = start + tl.arange(0, BLOCK_R)
    mask = (row < end)[:, None] & (d < D)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0)

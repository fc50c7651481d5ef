"""Masked L2 losses on the GPU; differences, and targets that are embedded patches, are never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.architecture import target_of
from ..gpu.config import Launch, element_config, row_config, strides
from ..gpu.launch import launch
from ..patch_embed.gpu import patch_embed_forward
from ..patch_embed.patch_rows import patch_arguments, patch_corners, project_patches
from ..patch_embed.tiles import most_tiles, precision_of, tile_count, tiles
from .reference import NORMALIZE_EPSILON, gradient_dtype

PROGRAMS = 1024  # upper limit: enough for any GPU, few enough for one program to add up their sums


def masked_l2_loss_forward(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    normalize: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradient with respect to the prediction (empty unless `with_gradient`).

    Two launches; torch adds up the weights, if any.
    """
    gradient = prediction.new_empty(*(prediction.shape if with_gradient else (0,)), dtype=gradient_dtype(prediction))
    total = _total(weights)
    loss = _compare(gradient if with_gradient else None, prediction, target, ids, weights, total, normalize)
    return loss, gradient


def patch_l2_loss_forward(
    prediction: Tensor,
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    normalize: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradient with respect to the prediction (empty unless `with_gradient`).

    Two launches; torch adds up the weights, if any. To normalise a target its whole row is needed first: another launch
    embeds the patches, and the gradient overwrites them.
    """
    batch, tokens, width = prediction.shape
    device, rows, dtype = prediction.device, batch * tokens, gradient_dtype(prediction)
    total = _total(weights)
    if normalize:
        target = patch_embed_forward(volume, weight, bias, ids, None)
        out = target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)
        loss = _compare(out if with_gradient else None, prediction, target, None, weights, total, True)
        return loss, out if with_gradient else prediction.new_empty(0, dtype=dtype)
    gradient = prediction.new_empty(batch, tokens, width, dtype=dtype) if with_gradient else None
    precision = precision_of(weight.dtype, device)
    programs = most_tiles(target_of(device), weight.dtype, precision, rows, width)
    errors = prediction.new_empty(programs, dtype=torch.float32)
    tensors = (
        errors,
        gradient,
        total,
        prediction,
        volume,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        ids,
        weights,
    )
    numbers = (
        rows,
        tokens,
        width,
        weight.dtype,
        precision,
        volume.shape,
        volume.stride(),
        weight.shape,
        prediction.stride(),
        ids.stride(),
        None if weights is None else weights.stride(),
    )
    launched = launch(_describe_patch, tensors, numbers)
    launched_tiles = tile_count(launched.constants, rows, width)
    loss = _mean(errors if launched_tiles == errors.numel() else errors[:launched_tiles], total, rows)
    return loss, prediction.new_empty(0, dtype=dtype) if gradient is None else gradient


def _describe_patch(
    target: str,
    rows: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    precision: str,
    volume: tuple[int, ...],
    volume_strides: tuple[int, ...],
    weight: tuple[int, ...],
    prediction: tuple[int, ...],
    ids: tuple[int, ...],
    weights: tuple[int, ...] | None,
) -> Launch:
    arguments = {
        "ROWS": rows,
        "M": tokens,
        "D": width,
        **strides("prediction", "bmd", prediction),
        **strides("weights", "bm", weights),
        **patch_arguments(volume, volume_strides, weight[2:]),
        **strides("ids", "bm", ids),
        "PRECISION": precision,
    }
    table = tiles(target, dtype, precision, rows, width)
    # Without a limit ptxas spills a few registers for this tile on sm_80 to sm_89; with one, for another on sm_120.
    spilled = {"BLOCK_M": 64, "BLOCK_N": 128}.items()
    configs = tuple(
        config._replace(registers=255) if spilled <= config.constants.items() else config for config in table
    )
    return Launch(_patch_l2_forward, lambda c: (tile_count(c, rows, width),), arguments, configs)


def _compare(
    gradient: Tensor | None,
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    total: Tensor | None,
    normalize: bool,
) -> Tensor:
    """Return the loss and write `gradient`, contiguous, which may be the target: each row is read before written."""
    batch, tokens, width = prediction.shape
    rows = batch * tokens
    rows_per_program = max(1, -(-rows // PROGRAMS))
    programs = -(-rows // rows_per_program)
    errors = prediction.new_empty(programs, dtype=torch.float32)
    numbers = (
        rows,
        tokens,
        width,
        rows_per_program,
        prediction.stride(),
        target.stride(),
        None if ids is None else ids.stride(),
        None if weights is None else weights.stride(),
        bool(normalize),
    )
    launch(_describe_masked, (errors, gradient, total, prediction, target, ids, weights), numbers)
    return _mean(errors, total, rows)


def _describe_masked(
    target: str,
    rows: int,
    tokens: int,
    width: int,
    rows_per_program: int,
    prediction: tuple[int, ...],
    targets: tuple[int, ...],
    ids: tuple[int, ...] | None,
    weights: tuple[int, ...] | None,
    normalize: bool,
) -> Launch:
    arguments = {
        "ROWS": rows,
        "M": tokens,
        "D": width,
        "rows_per_program": rows_per_program,
        **strides("prediction", "bmd", prediction),
        **strides("target", "bnd", targets),
        **strides("ids", "bm", ids),
        **strides("weights", "bm", weights),
        "NORMALIZE": normalize,
        "EPSILON": NORMALIZE_EPSILON,
    }
    programs = triton.cdiv(rows, rows_per_program)
    return Launch(_masked_l2_forward, lambda c: (programs,), arguments, (row_config(width, target),))


def _total(weights: Tensor | None) -> Tensor | None:
    """Return the sum of the weights; None stands for the number of rows."""
    return None if weights is None else weights.sum(dtype=torch.float32)


def _mean(errors: Tensor, total: Tensor | None, rows: int) -> Tensor:
    loss = errors.new_empty(())
    launch(_describe_mean, (loss, errors, total), (errors.numel(), rows))
    return loss


def _describe_mean(target: str, count: int, rows: int) -> Launch:
    config = element_config({"BLOCK": 1024}, 1024, target)
    return Launch(_weighted_mean, lambda c: (1,), {"ERRORS": count, "ROWS": rows}, (config,))


@triton.jit
def _row_difference(
    prediction_at, target_at,  # [BLOCK_D] pointers
    has_channel,
    D,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr,
):
    """Return prediction minus target in float32, 0 past the end of the row."""
    prediction = tl.load(prediction_at, mask=has_channel, other=0).to(tl.float32)
    target = tl.load(target_at, mask=has_channel, other=0).to(tl.float32)
    if NORMALIZE:
        centred = tl.where(has_channel, target - tl.sum(target) / D, 0.0)
        variance = tl.sum(centred * centred) / tl.maximum(D - 1, 1)
        target = centred / tl.sqrt_rn(variance + EPSILON)
    return prediction - target


@triton.jit
def sum_of_weights(
    total_ptr,         # scalar, sum of all weights; None: the weights are 1 and their sum is ROWS
    ROWS,
):
    """Return the divisor of the loss: the sum of all weights, 1 instead of 0."""
    total = tl.full((), ROWS, tl.float32) if total_ptr is None else tl.load(total_ptr)
    return tl.where(total == 0, 1.0, total)


@triton.jit
def _masked_l2_forward(
    error_ptr,         # [programs] weighted errors, summed over each program's rows
    gradient_ptr,      # [B, M, D] gradient of the loss with respect to the prediction, or None
    total_ptr,         # scalar, see sum_of_weights
    prediction_ptr,    # [B, M, D]
    target_ptr,        # [B, N, D]
    ids_ptr,           # [B, M] int64; None: target row m belongs to prediction m
    weights_ptr,       # [B, M]; None: all weights are 1
    ROWS, M, D,
    rows_per_program,
    stride_prediction_b, stride_prediction_m, stride_prediction_d,
    stride_target_b, stride_target_n, stride_target_d,
    stride_ids_b, stride_ids_m, stride_weights_b, stride_weights_m,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_D).to(tl.int64)
    has_channel = channel < D
    scale = 2.0 / (D * sum_of_weights(total_ptr, ROWS))
    error_sum = 0.0
    for row in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, ROWS)):
        b, m = (row // M).to(tl.int64), (row % M).to(tl.int64)
        n = m if ids_ptr is None else tl.load(ids_ptr + b * stride_ids_b + m * stride_ids_m)
        difference = _row_difference(
            prediction_ptr + b * stride_prediction_b + m * stride_prediction_m + channel * stride_prediction_d,
            target_ptr + b * stride_target_b + n * stride_target_n + channel * stride_target_d,
            has_channel, D, NORMALIZE, EPSILON,
        )
        weighted = difference
        if weights_ptr is not None:
            weighted *= tl.load(weights_ptr + b * stride_weights_b + m * stride_weights_m).to(tl.float32)
        error_sum += tl.sum(weighted * difference) / D
        if gradient_ptr is not None:
            gradient_at = gradient_ptr + tl.cast(row, tl.int64) * D + channel
            tl.store(gradient_at, (scale * weighted).to(gradient_ptr.dtype.element_ty), mask=has_channel)
    tl.store(error_ptr + program, error_sum)


@triton.jit
def _weighted_mean(
    loss_ptr,          # scalar
    error_ptr,         # [ERRORS] sums of weighted errors
    total_ptr,         # scalar, see sum_of_weights
    ERRORS, ROWS,
    BLOCK: tl.constexpr,
):
    """Store the sum of errors over the sum of weights, 0 if that is 0."""
    offset = tl.arange(0, BLOCK)
    errors = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, ERRORS, BLOCK):
        errors += tl.load(error_ptr + start + offset, mask=start + offset < ERRORS, other=0)
    tl.store(loss_ptr, tl.sum(errors) / sum_of_weights(total_ptr, ROWS))


@triton.jit
def _patch_l2_forward(
    error_ptr,         # [programs] weighted errors, summed over each program's tile
    gradient_ptr,      # [B, M, D] gradient of the loss with respect to the prediction, or None
    total_ptr,         # scalar, see sum_of_weights
    prediction_ptr,    # [B, M, D]
    volume_ptr,        # [B, C, T, H, W]
    weight_ptr,        # [D, P]
    bias_ptr,          # [D] or None
    ids_ptr,           # [B, M] int64
    weights_ptr,       # [B, M]; None: all weights are 1
    ROWS, M, D, GRID_H, GRID_W,
    stride_prediction_b, stride_prediction_m, stride_prediction_d,
    stride_volume_b, stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w,
    stride_ids_b, stride_ids_m, stride_weights_b, stride_weights_m,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    columns = tl.cdiv(D, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < ROWS)[:, None] & (column < D)[None, :]
    last_row = tl.minimum(row, ROWS - 1)
    _, corner = patch_corners(
        last_row, ids_ptr, stride_ids_b, stride_ids_m, M, GRID_H, GRID_W,
        stride_volume_b, stride_volume_t, stride_volume_h, stride_volume_w, PT, PH, PW,
    )
    target = project_patches(
        volume_ptr, weight_ptr, corner, tl.minimum(column, D - 1),
        stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w,
        PT, PH, PW, P, WIDE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )
    if bias_ptr is not None:
        target += tl.load(bias_ptr + column, mask=column < D, other=0).to(tl.float32)[None, :]
    b, m = (last_row // M).to(tl.int64), (last_row % M).to(tl.int64)
    prediction_at = prediction_ptr + (b * stride_prediction_b + m * stride_prediction_m)[:, None]
    prediction_at += column[None, :].to(tl.int64) * stride_prediction_d
    prediction = tl.load(prediction_at, mask=inside, other=0).to(tl.float32)
    difference = tl.where(inside, prediction - target, 0.0)
    weighted = difference
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + b * stride_weights_b + m * stride_weights_m).to(tl.float32)
        weighted *= weight[:, None]
    tl.store(error_ptr + tl.program_id(0), tl.sum(weighted * difference) / D)
    if gradient_ptr is not None:
        gradient = weighted * (2.0 / (D * sum_of_weights(total_ptr, ROWS)))
        gradient_at = gradient_ptr + row[:, None].to(tl.int64) * D + column[None, :]
        tl.store(gradient_at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)

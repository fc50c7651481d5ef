"""L2 losses on masked tokens on the GPU: neither differences nor, for patches, targets are ever in memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, launch, row_config, strides
from ..patch_embed.tiles import precision_of, tile_count, tiles
from ..patch_embed.triton_kernel import (
    patch_arguments,
    patch_corners,
    patch_embed_forward,
    project_patches,
)
from .reference import NORMALIZE_EPSILON

PROGRAMS = 1024  # at most, of a sum over rows: enough for any GPU, few enough for one program to add up


def masked_l2_loss_forward(
    prediction: Tensor, target: Tensor, ids: Tensor | None, weights: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The loss and the sum of all weights, float32 scalars, in two launches."""
    batch, tokens, _ = prediction.shape
    rows = batch * tokens
    rows_per_program = max(1, triton.cdiv(rows, PROGRAMS))
    programs = triton.cdiv(rows, rows_per_program)
    errors = torch.empty(programs, dtype=torch.float32, device=prediction.device)
    weight_sums = None if weights is None else torch.empty_like(errors)
    arguments = {
        "error_ptr": errors,
        "weight_ptr": weight_sums,
        **_row_arguments(prediction, target, ids, weights, normalize),
        "ROWS": rows,
        "rows_per_program": rows_per_program,
    }
    launch(_masked_l2_forward, lambda c: (programs,), arguments, (row_config(prediction.shape[2], prediction.device),))
    return _mean(errors, weight_sums, rows)


def masked_l2_loss_backward(
    grad_loss: Tensor,
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    total: Tensor,
    normalize: bool,
) -> Tensor:
    """The gradient by the prediction, in one launch that computes the differences again."""
    gradient = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    _write_gradient(gradient, grad_loss, prediction, target, ids, weights, total, normalize)
    return gradient


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
    """The loss, and its gradient by the prediction (of no elements unless asked for), in two launches.

    A normalised target needs its whole row before any difference: it is written where its gradient then replaces it.
    """
    batch, tokens, width = prediction.shape
    device, rows = prediction.device, batch * tokens
    if normalize:
        target = patch_embed_forward(volume, weight, bias, ids, None, prediction.dtype)
        loss, weight_sum = masked_l2_loss_forward(prediction, target, None, weights, True)
        if not with_gradient:
            return loss, prediction.new_empty(0)
        _write_gradient(target, torch.ones_like(loss), prediction, target, None, weights, weight_sum, True)
        return loss, target
    gradient = torch.empty(prediction.shape, dtype=prediction.dtype, device=device) if with_gradient else None
    total = None if weights is None else weights.sum(dtype=torch.float32)
    configs = tiles(weight.dtype, device, rows, width)
    tile_counts = [tile_count(config.constants, rows, width) for config in configs]
    errors = torch.empty(max(tile_counts), dtype=torch.float32, device=device)
    arguments = {
        "error_ptr": errors,
        "gradient_ptr": gradient,
        "total_ptr": total,
        "prediction_ptr": prediction,
        "weight_ptr": weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "weights_ptr": weights,
        "ROWS": rows,
        "M": tokens,
        "D": width,
        **strides("prediction", "bmd", prediction),
        **strides("weights", "bm", weights),
        "volume_ptr": volume,
        **patch_arguments(volume, weight.shape[2:]),
        "ids_ptr": ids,
        **strides("ids", "bm", ids),
        "PRECISION": precision_of(weight.dtype, device),
    }
    launched = launch(_patch_l2_forward, lambda c: (tile_count(c, rows, width),), arguments, configs)
    loss, _ = _mean(errors[: tile_count(launched.constants, rows, width)], total, rows)
    return loss, prediction.new_empty(0) if gradient is None else gradient


def _write_gradient(
    gradient: Tensor,
    grad_loss: Tensor,
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    total: Tensor,
    normalize: bool,
) -> None:
    """Into `gradient`, contiguous, which may be the target itself: a program has read its row before it writes it."""
    batch, tokens, width = prediction.shape
    arguments = {
        "grad_prediction_ptr": gradient,
        "grad_loss_ptr": grad_loss,
        "total_ptr": total,
        **_row_arguments(prediction, target, ids, weights, normalize),
    }
    launch(_masked_l2_backward, lambda c: (batch * tokens,), arguments, (row_config(width, prediction.device),))


def _mean(errors: Tensor, weight_sums: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    loss, total = (torch.empty((), dtype=torch.float32, device=errors.device) for _ in range(2))
    arguments = {
        "loss_ptr": loss,
        "total_ptr": total,
        "error_ptr": errors,
        "weight_ptr": weight_sums,
        "ERRORS": errors.numel(),
        "WEIGHTS": rows if weight_sums is None else weight_sums.numel(),
    }
    launch(_weighted_mean, lambda c: (1,), arguments, (Config({"BLOCK": 1024}, warps=4),))
    return loss, total


def _row_arguments(
    prediction: Tensor, target: Tensor, ids: Tensor | None, weights: Tensor | None, normalize: bool
) -> dict[str, Any]:
    return {
        "prediction_ptr": prediction,
        "target_ptr": target,
        "ids_ptr": ids,
        "weights_ptr": weights,
        "M": prediction.shape[1],
        "D": prediction.shape[2],
        **strides("prediction", "bmd", prediction),
        **strides("target", "bnd", target),
        **strides("ids", "bm", ids),
        **strides("weights", "bm", weights),
        "NORMALIZE": normalize,
        "EPSILON": NORMALIZE_EPSILON,
    }


@triton.jit
def _row_difference(
    prediction_at, target_at,  # [BLOCK_D] pointers
    has_channel,
    D,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr,
):
    """Prediction minus target, 0 past the end, float32."""
    prediction = tl.load(prediction_at, mask=has_channel, other=0).to(tl.float32)
    target = tl.load(target_at, mask=has_channel, other=0).to(tl.float32)
    if NORMALIZE:
        centred = tl.where(has_channel, target - tl.sum(target) / D, 0.0)
        variance = tl.sum(centred * centred) / tl.maximum(D - 1, 1)
        target = centred / tl.sqrt_rn(variance + EPSILON)
    return prediction - target


@triton.jit
def _masked_l2_forward(
    error_ptr,         # [programs] sum of its rows' weighted errors
    weight_ptr,        # [programs] sum of their weights, or None
    prediction_ptr,    # [B, M, D]
    target_ptr,        # [B, N, D]
    ids_ptr,           # [B, M] int64, or None: row by row
    weights_ptr,       # [B, M], or None: 1 each
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
    error_sum, weight_sum = 0.0, 0.0
    for row in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, ROWS)):
        b, m = (row // M).to(tl.int64), (row % M).to(tl.int64)
        n = m if ids_ptr is None else tl.load(ids_ptr + b * stride_ids_b + m * stride_ids_m)
        difference = _row_difference(
            prediction_ptr + b * stride_prediction_b + m * stride_prediction_m + channel * stride_prediction_d,
            target_ptr + b * stride_target_b + n * stride_target_n + channel * stride_target_d,
            has_channel, D, NORMALIZE, EPSILON,
        )
        error = tl.sum(difference * difference) / D
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + b * stride_weights_b + m * stride_weights_m).to(tl.float32)
            error *= weight
            weight_sum += weight
        error_sum += error
    tl.store(error_ptr + program, error_sum)
    if weight_ptr is not None:
        tl.store(weight_ptr + program, weight_sum)


@triton.jit
def _weighted_mean(
    loss_ptr,          # scalar
    total_ptr,         # scalar, sum of all weights
    error_ptr,         # [ERRORS] sums of weighted errors
    weight_ptr,        # [WEIGHTS] sums of weights, or None: WEIGHTS is their sum
    ERRORS, WEIGHTS,
    BLOCK: tl.constexpr,
):
    """Sum of errors over sum of weights, 0 where that is 0."""
    place = tl.arange(0, BLOCK)
    errors, weights = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, ERRORS, BLOCK):
        errors += tl.load(error_ptr + start + place, mask=start + place < ERRORS, other=0)
    if weight_ptr is None:
        total = tl.full((), WEIGHTS, tl.float32)
    else:
        for start in range(0, WEIGHTS, BLOCK):
            weights += tl.load(weight_ptr + start + place, mask=start + place < WEIGHTS, other=0)
        total = tl.sum(weights)
    tl.store(total_ptr, total)
    tl.store(loss_ptr, tl.sum(errors) / tl.where(total == 0, 1.0, total))


@triton.jit
def _masked_l2_backward(
    grad_prediction_ptr,  # [B, M, D]
    grad_loss_ptr,     # scalar
    total_ptr,         # scalar, sum of all weights
    prediction_ptr,    # [B, M, D]
    target_ptr,        # [B, N, D]
    ids_ptr,           # [B, M] int64, or None
    weights_ptr,       # [B, M], or None
    M, D,
    stride_prediction_b, stride_prediction_m, stride_prediction_d,
    stride_target_b, stride_target_n, stride_target_d,
    stride_ids_b, stride_ids_m, stride_weights_b, stride_weights_m,
    NORMALIZE: tl.constexpr, EPSILON: tl.constexpr, BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    b, m = (row // M).to(tl.int64), (row % M).to(tl.int64)
    n = m if ids_ptr is None else tl.load(ids_ptr + b * stride_ids_b + m * stride_ids_m)
    channel = tl.arange(0, BLOCK_D).to(tl.int64)
    has_channel = channel < D
    difference = _row_difference(
        prediction_ptr + b * stride_prediction_b + m * stride_prediction_m + channel * stride_prediction_d,
        target_ptr + b * stride_target_b + n * stride_target_n + channel * stride_target_d,
        has_channel, D, NORMALIZE, EPSILON,
    )
    total = tl.load(total_ptr)
    scale = tl.load(grad_loss_ptr).to(tl.float32) * 2.0 / (D * tl.where(total == 0, 1.0, total))
    if weights_ptr is not None:
        scale *= tl.load(weights_ptr + b * stride_weights_b + m * stride_weights_m).to(tl.float32)
    gradient = (scale * difference).to(grad_prediction_ptr.dtype.element_ty)
    tl.store(grad_prediction_ptr + row.to(tl.int64) * D + channel, gradient, mask=has_channel)


@triton.jit
def _patch_l2_forward(
    error_ptr,         # [programs] sum of the tile's weighted errors
    gradient_ptr,      # [B, M, D] of the loss by the prediction, or None
    total_ptr,         # scalar, sum of all weights, or None: ROWS
    prediction_ptr,    # [B, M, D]
    volume_ptr,        # [B, C, T, H, W]
    weight_ptr,        # [D, P]
    bias_ptr,          # [D] or None
    ids_ptr,           # [B, M] int64
    weights_ptr,       # [B, M], or None: 1 each
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
        total = ROWS.to(tl.float32) if total_ptr is None else tl.load(total_ptr)
        gradient = weighted * (2.0 / (D * tl.where(total == 0, 1.0, total)))
        gradient_at = gradient_ptr + row[:, None].to(tl.int64) * D + column[None, :]
        tl.store(gradient_at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)

"""Patch embedding on the GPU: GEMMs that gather their rows directly from the volume."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.config import Config, Launch, element_config, family_of, strides
from ..gpu.launch import launch
from ..gpu.partial_sums import sum_partials
from .patch_rows import patch_arguments, patch_corners, patch_offsets, project_patches
from .reference import token_count
from .tiles import precision_of, tile_count, tiles, weight_splits


def patch_embed_forward(
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    """Return `patch_embed_reference` in one launch, in the dtype that weight and position promote to."""
    shape = weight.shape
    batch, tokens = volume.shape[0], token_count(volume, shape[2:]) if ids is None else ids.shape[1]
    dtype = weight.dtype if position is None else torch.promote_types(weight.dtype, position.dtype)
    out = weight.new_empty(batch, tokens, shape[0], dtype=dtype)
    bias = None if bias is None else bias.contiguous()
    tensors = (out, volume, weight.contiguous(), bias, ids, position)
    numbers = batch * tokens, tokens, None if position is None else position.stride()
    launch(_describe_forward, tensors, (*numbers, *_common(volume, weight, ids)))
    return out


def patch_embed_backward(
    grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of volume, weight, bias and position, or None for those not in `needs`; deterministic."""
    grad_volume = _volume_gradient(grad, volume, weight, ids) if needs[0] else None
    grad_weight = grad_bias = grad_position = None
    if needs[1]:
        grad_weight, grad_bias = _weight_gradient(grad, volume, weight, ids, needs[2])
    elif needs[2]:
        grad_bias = grad.sum((0, 1)).to(weight.dtype)
    if needs[3]:
        if ids is None:
            grad_position = grad.sum(0)
        else:
            count = token_count(volume, weight.shape[2:])
            grad_position = torch.ops.aten.embedding_dense_backward(grad.contiguous(), ids, count, -1, False)
    return grad_volume, grad_weight, grad_bias, grad_position


def gather_patches(volume: Tensor, ids: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Return the patches `ids [B, K]` of `volume [B, C, T, H, W]` as rows `[B, K, C*pt*ph*pw]`, in one launch."""
    (batch, tokens), shape = ids.shape, volume.shape
    elements = shape[1] * math.prod(patch)
    out = volume.new_empty(batch, tokens, elements)
    numbers = batch * tokens, tokens, elements, shape, volume.stride(), tuple(patch), ids.stride()
    launch(_describe_gather, (out, volume, ids), numbers)
    return out


def _weight_gradient(
    grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    shape = weight.shape
    width, elements, (batch, tokens) = shape[0], math.prod(shape[1:]), grad.shape[:2]
    grad, rows = grad.to(weight.dtype), batch * tokens
    splits = weight_splits(rows, width, elements, weight.element_size(), volume.element_size())
    dtype = torch.float32 if splits > 1 else weight.dtype
    sums = grad.new_empty(splits, width, elements, dtype=dtype)
    bias_sums = grad.new_empty(splits, width, dtype=dtype) if needs_bias else None
    numbers = rows, tokens, splits, grad.stride()
    launch(_describe_weight, (sums, bias_sums, grad, volume, ids), (*numbers, *_common(volume, weight, ids)))
    if splits == 1:
        return sums.view(shape), None if bias_sums is None else bias_sums[0]
    grad_weight = weight.new_empty(*shape)
    sum_partials(sums, (grad_weight,))
    if bias_sums is None:
        return grad_weight, None
    grad_bias = weight.new_empty(width)
    sum_partials(bias_sums, (grad_bias,))
    return grad_weight, grad_bias


def _volume_gradient(grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
    grad_volume = torch.zeros(volume.shape, dtype=volume.dtype, device=volume.device)
    batch, tokens = grad.shape[:2]
    order, runs = (None, None) if ids is None else _group_by_token(ids, token_count(volume, weight.shape[2:]))
    tensors = (grad_volume, grad, weight.contiguous(), ids, order, runs)
    launch(_describe_volume, tensors, (batch * tokens, tokens, grad.stride(), *_common(grad_volume, weight, ids)))
    return grad_volume


def _common(volume: Tensor, weight: Tensor, ids: Tensor | None) -> tuple[Any, ...]:
    """Return the numbers that all GEMM launches need of these three tensors."""
    dtype = weight.dtype
    ids_strides = None if ids is None else ids.stride()
    return dtype, precision_of(dtype, volume.device), volume.shape, volume.stride(), weight.shape, ids_strides


def _describe_forward(
    target: str,
    rows: int,
    tokens: int,
    position: tuple[int, ...] | None,
    dtype: torch.dtype,
    precision: str,
    volume: tuple[int, ...],
    volume_strides: tuple[int, ...],
    weight: tuple[int, ...],
    ids: tuple[int, ...] | None,
) -> Launch:
    width = weight[0]
    arguments = {
        **strides("position", "nd", position),
        "ROWS": rows,
        "K": tokens,
        "D": width,
        **patch_arguments(volume, volume_strides, weight[2:]),
        **strides("ids", "bk", ids),
        "PRECISION": precision,
    }
    table = tiles(target, dtype, precision, rows, width)
    if position is None:  # ptxas would spill a few registers on sm_120
        table = tuple(config._replace(registers=255) for config in table)
    return Launch(_patch_embed_forward, lambda c: (tile_count(c, rows, width),), arguments, table)


def _describe_weight(
    target: str,
    rows: int,
    tokens: int,
    splits: int,
    grad: tuple[int, ...],
    dtype: torch.dtype,
    precision: str,
    volume: tuple[int, ...],
    volume_strides: tuple[int, ...],
    weight: tuple[int, ...],
    ids: tuple[int, ...] | None,
) -> Launch:
    width, elements = weight[0], math.prod(weight[1:])
    arguments = {
        "ROWS": rows,
        "K": tokens,
        "D": width,
        "rows_per_split": triton.cdiv(triton.cdiv(rows, splits), 64) * 64,
        **strides("grad", "bkd", grad),
        **patch_arguments(volume, volume_strides, weight[2:]),
        **strides("ids", "bk", ids),
        "PRECISION": precision,
    }
    table = tiles(target, dtype, precision, width, elements, splits)
    # The loop gathers by indices that it loads itself; without the limit ptxas would spill a few registers.
    configs = tuple(config._replace(registers=255) for config in table)
    if family_of(target) == "rdna" and dtype == torch.bfloat16:  # the masks of 32 rows would spill scalar registers
        configs = tuple(map(_shallow, configs))
    return Launch(
        _patch_embed_weight_gradient, lambda c: (tile_count(c, width, elements), splits), arguments, configs
    )


def _shallow(config: Config) -> Config:
    """Return the config with half the depth of its tiles."""
    return config._replace(constants={**config.constants, "BLOCK_K": config.constants["BLOCK_K"] // 2})


def _describe_volume(
    target: str,
    rows: int,
    tokens: int,
    grad: tuple[int, ...],
    dtype: torch.dtype,
    precision: str,
    volume: tuple[int, ...],
    volume_strides: tuple[int, ...],
    weight: tuple[int, ...],
    ids: tuple[int, ...] | None,
) -> Launch:
    elements = math.prod(weight[1:])
    arguments = {
        "ROWS": rows,
        "K": tokens,
        "D": weight[0],
        **strides("grad", "bkd", grad),
        **patch_arguments(volume, volume_strides, weight[2:]),
        **strides("ids", "bk", ids),
        "PRECISION": precision,
    }
    table = tiles(target, dtype, precision, rows, elements)
    configs = tuple(config._replace(registers=255) for config in table)  # as for the weight
    if target == "gfx942" and dtype == torch.bfloat16:  # as for the weight, with tiles of 128 rows
        configs = tuple(_shallow(config) if config.constants["BLOCK_M"] == 128 else config for config in configs)
    return Launch(_patch_embed_volume_gradient, lambda c: (tile_count(c, rows, elements),), arguments, configs)


def _describe_gather(
    target: str,
    rows: int,
    tokens: int,
    elements: int,
    volume: tuple[int, ...],
    volume_strides: tuple[int, ...],
    patch: tuple[int, ...],
    ids: tuple[int, ...],
) -> Launch:
    arguments = {
        "ROWS": rows,
        "K": tokens,
        **patch_arguments(volume, volume_strides, patch),
        **strides("ids", "bk", ids),
    }
    config = element_config({"BLOCK_M": 4, "BLOCK_N": 256}, 1024, target)
    return Launch(_gather_patches, lambda c: (tile_count(c, rows, elements),), arguments, (config,))


def _group_by_token(ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sort the rows by sample and token.

    Returns:
        The row numbers in that order, and at the first row of each token the number of its rows, 0 at the others.
    """
    key = (ids + torch.arange(len(ids), device=ids.device)[:, None] * tokens).flatten()
    ordered, order = key.sort(stable=True)
    index = torch.arange(len(key), device=ids.device)
    first, end = torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
    return order, torch.where(first == index, end - index, 0)


@triton.jit
def _patch_embed_forward(
    out_ptr,           # [B*K, D]
    volume_ptr,        # [B, C, T, H, W]
    weight_ptr,        # [D, P]
    bias_ptr,          # [D] or None
    ids_ptr,           # [B, K] int64 or None
    position_ptr,      # [N, D] or None
    ROWS, K, D, GRID_H, GRID_W,
    stride_volume_b, stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w,
    stride_ids_b, stride_ids_k, stride_position_n, stride_position_d,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    # Consecutive programs share their rows: patches are read from memory once, the weight stays in the L2 cache.
    columns = tl.cdiv(D, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < ROWS)[:, None] & (column < D)[None, :]
    # Rows and columns past the end repeat the last one, so that the loop needs no mask for them.
    token, corner = patch_corners(
        tl.minimum(row, ROWS - 1), ids_ptr, stride_ids_b, stride_ids_k, K, GRID_H, GRID_W,
        stride_volume_b, stride_volume_t, stride_volume_h, stride_volume_w, PT, PH, PW,
    )
    embedded = project_patches(
        volume_ptr, weight_ptr, corner, tl.minimum(column, D - 1),
        stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w,
        PT, PH, PW, P, WIDE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )
    if bias_ptr is not None:
        embedded += tl.load(bias_ptr + column, mask=column < D, other=0).to(tl.float32)[None, :]
    if position_ptr is not None:
        position_at = position_ptr + token[:, None] * stride_position_n
        position_at += column[None, :].to(tl.int64) * stride_position_d
        embedded += tl.load(position_at, mask=inside, other=0).to(tl.float32)
    out_at = out_ptr + row[:, None].to(tl.int64) * D + column[None, :]
    tl.store(out_at, embedded.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _patch_embed_weight_gradient(
    grad_weight_ptr,   # [SPLITS, D, P] partial sums
    grad_bias_ptr,     # [SPLITS, D] partial sums, or None
    grad_ptr,          # [B, K, D]
    volume_ptr,        # [B, C, T, H, W]
    ids_ptr,           # [B, K] int64 or None
    ROWS, K, D, GRID_H, GRID_W,
    rows_per_split,    # a multiple of BLOCK_K
    stride_grad_b, stride_grad_k, stride_grad_d,
    stride_volume_b, stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w,
    stride_ids_b, stride_ids_k,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    columns = tl.cdiv(P, BLOCK_N)
    channel = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    element = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    has_channel, has_element = channel < D, element < P
    offset = patch_offsets(
        element, stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w, PT, PH, PW, WIDE
    )
    weight_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_sum = tl.zeros((BLOCK_M,), tl.float32)
    first = split * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, ROWS), BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        inside = row < ROWS
        row = tl.minimum(row, ROWS - 1)
        _, corner = patch_corners(
            row, ids_ptr, stride_ids_b, stride_ids_k, K, GRID_H, GRID_W,
            stride_volume_b, stride_volume_t, stride_volume_h, stride_volume_w, PT, PH, PW,
        )
        grad_row = (row // K).to(tl.int64) * stride_grad_b + (row % K).to(tl.int64) * stride_grad_k
        grad_at = grad_ptr + grad_row[None, :] + channel[:, None].to(tl.int64) * stride_grad_d
        grad = tl.load(grad_at, mask=inside[None, :] & has_channel[:, None], other=0)
        patch_at = volume_ptr + corner[:, None] + offset[None, :]
        if P % BLOCK_N == 0:
            patch = tl.load(patch_at, mask=inside[:, None], other=0)
        else:
            patch = tl.load(patch_at, mask=inside[:, None] & has_element[None, :], other=0)
        weight_sum = tl.dot(grad, patch.to(grad.dtype), weight_sum, input_precision=PRECISION)
        if grad_bias_ptr is not None:
            bias_sum += tl.sum(grad.to(tl.float32), axis=1)
    weight_at = grad_weight_ptr + (split.to(tl.int64) * D + channel[:, None]) * P + element[None, :]
    inside = has_channel[:, None] & has_element[None, :]
    tl.store(weight_at, weight_sum.to(grad_weight_ptr.dtype.element_ty), mask=inside)
    if grad_bias_ptr is not None and tl.program_id(0) % columns == 0:
        bias_at = grad_bias_ptr + split * D + channel
        tl.store(bias_at, bias_sum.to(grad_bias_ptr.dtype.element_ty), mask=has_channel)


@triton.jit
def _patch_embed_volume_gradient(
    grad_volume_ptr,   # [B, C, T, H, W], zero
    grad_ptr,          # [B, K, D]
    weight_ptr,        # [D, P]
    ids_ptr,           # [B, K] int64 or None
    order_ptr,         # [B*K] int64 rows sorted by sample and token; None: no token repeats
    runs_ptr,          # [B*K] int64 number of rows of a token at its first row, 0 at the others; None like order_ptr
    ROWS, K, D, GRID_H, GRID_W,
    stride_grad_b, stride_grad_k, stride_grad_d,
    stride_volume_b, stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w,  # of grad_volume
    stride_ids_b, stride_ids_k,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    columns = tl.cdiv(P, BLOCK_N)
    place = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    element = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    has_element = element < P
    exists = place < ROWS
    run = exists.to(tl.int64) if runs_ptr is None else tl.load(runs_ptr + place, mask=exists, other=0)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The first row of a token adds the others in order and writes the patch: deterministic, without atomics.
    for repeat in range(tl.max(run).to(tl.int32)):
        adds = repeat < run
        row = place if order_ptr is None else tl.load(order_ptr + place + repeat, mask=adds, other=0).to(tl.int32)
        grad_row = (row // K).to(tl.int64) * stride_grad_b + (row % K).to(tl.int64) * stride_grad_k
        for start in range(0, D, BLOCK_K):
            channel = start + tl.arange(0, BLOCK_K)
            inside = channel < D
            grad_at = grad_ptr + grad_row[:, None] + channel[None, :].to(tl.int64) * stride_grad_d
            grad = tl.load(grad_at, mask=adds[:, None] & inside[None, :], other=0)
            weight_at = weight_ptr + channel[:, None].to(tl.int64) * P + element[None, :]
            weight = tl.load(weight_at, mask=inside[:, None] & has_element[None, :], other=0)
            product = tl.dot(grad.to(weight.dtype), weight, product, input_precision=PRECISION)
    writes = run > 0
    row = place if order_ptr is None else tl.load(order_ptr + place, mask=writes, other=0).to(tl.int32)
    _, corner = patch_corners(
        tl.minimum(row, ROWS - 1), ids_ptr, stride_ids_b, stride_ids_k, K, GRID_H, GRID_W,
        stride_volume_b, stride_volume_t, stride_volume_h, stride_volume_w, PT, PH, PW,
    )
    offset = patch_offsets(
        element, stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w, PT, PH, PW, WIDE
    )
    volume_at = grad_volume_ptr + corner[:, None] + offset[None, :]
    tl.store(volume_at, product.to(grad_volume_ptr.dtype.element_ty), mask=writes[:, None] & has_element[None, :])


@triton.jit
def _gather_patches(
    out_ptr,           # [B*K, P]
    volume_ptr,        # [B, C, T, H, W]
    ids_ptr,           # [B, K] int64
    ROWS, K, GRID_H, GRID_W,
    stride_volume_b, stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w,
    stride_ids_b, stride_ids_k,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    columns = tl.cdiv(P, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    element = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < ROWS)[:, None] & (element < P)[None, :]
    _, corner = patch_corners(
        tl.minimum(row, ROWS - 1), ids_ptr, stride_ids_b, stride_ids_k, K, GRID_H, GRID_W,
        stride_volume_b, stride_volume_t, stride_volume_h, stride_volume_w, PT, PH, PW,
    )
    offset = patch_offsets(
        element, stride_volume_c, stride_volume_t, stride_volume_h, stride_volume_w, PT, PH, PW, WIDE
    )
    patch = tl.load(volume_ptr + corner[:, None] + offset[None, :], mask=inside, other=0)
    tl.store(out_ptr + row[:, None].to(tl.int64) * P + element[None, :], patch, mask=inside)

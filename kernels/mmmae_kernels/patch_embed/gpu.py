"""Patch embedding on the GPU: GEMMs whose rows are gathered straight from the volume."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.launch import element_config, launch, strides
from ..gpu.partial_sums import sum_partials
from .patch_rows import patch_arguments, patch_corners, patch_offsets, project_patches
from .reference import token_count
from .tiles import precision_of, tile_count, tiles

ROWS_PER_SPLIT = 256  # of the weight gradient, at least: a partial sum costs as much traffic as 3 to 6 rows of a tile


def patch_embed_forward(
    volume: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    """`patch_embed_reference` in one launch, in the type that weight and position promote to."""
    width, tokens = weight.shape[0], token_count(volume, weight.shape[2:]) if ids is None else ids.shape[1]
    dtype = weight.dtype if position is None else torch.promote_types(weight.dtype, position.dtype)
    out = torch.empty(volume.shape[0], tokens, width, dtype=dtype, device=volume.device)
    rows = volume.shape[0] * tokens
    arguments = {
        "out_ptr": out,
        "volume_ptr": volume,
        "weight_ptr": weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "position_ptr": position,
        **strides("position", "nd", position),
        "ROWS": rows,
        "K": tokens,
        "D": width,
        **patch_arguments(volume, weight.shape[2:]),
        "ids_ptr": ids,
        **strides("ids", "bk", ids),
        "PRECISION": precision_of(weight.dtype, volume.device),
    }
    launch(
        _patch_embed_forward,
        lambda c: (tile_count(c, rows, width),),
        arguments,
        tiles(weight.dtype, volume.device, rows, width),
    )
    return out


def patch_embed_backward(
    grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by volume, weight, bias and position, those that `needs` asks for; deterministic."""
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
    """Rows `[B, K, C*pt*ph*pw]` of the patches of `volume [B, C, T, H, W]` that `ids [B, K]` names, in one launch."""
    (batch, tokens), elements = ids.shape, volume.shape[1] * math.prod(patch)
    out = volume.new_empty(batch, tokens, elements)
    arguments = {
        "out_ptr": out,
        "volume_ptr": volume,
        "ROWS": batch * tokens,
        "K": tokens,
        **patch_arguments(volume, patch),
        "ids_ptr": ids,
        **strides("ids", "bk", ids),
    }
    config = element_config({"BLOCK_M": 4, "BLOCK_N": 256}, 1024, volume.device)
    launch(_gather_patches, lambda c: (tile_count(c, batch * tokens, elements),), arguments, (config,))
    return out


def _weight_gradient(
    grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    width, elements, rows = weight.shape[0], weight[0].numel(), grad.shape[0] * grad.shape[1]
    grad = grad.to(weight.dtype)
    # As many splits as fill the machine, by shape alone, so that a sum's order does not depend on the machine.
    splits = max(1, min(16, rows // ROWS_PER_SPLIT))
    table = tiles(weight.dtype, volume.device, width, elements, splits)
    # Its loop gathers by numbers that it loads itself: left alone, the assembler spills a few of its registers.
    configs = tuple(config._replace(registers=255) for config in table)
    sums = torch.empty(splits, width, elements, dtype=torch.float32, device=grad.device)
    bias_sums = torch.empty(splits, width, dtype=torch.float32, device=grad.device) if needs_bias else None
    arguments = {
        "grad_weight_ptr": sums,
        "grad_bias_ptr": bias_sums,
        "grad_ptr": grad,
        "volume_ptr": volume,
        "ROWS": rows,
        "K": grad.shape[1],
        "D": width,
        "rows_per_split": triton.cdiv(triton.cdiv(rows, splits), 64) * 64,
        **strides("grad", "bkd", grad),
        **patch_arguments(volume, weight.shape[2:]),
        "ids_ptr": ids,
        **strides("ids", "bk", ids),
        "PRECISION": precision_of(weight.dtype, volume.device),
    }
    launch(_patch_embed_weight_gradient, lambda c: (tile_count(c, width, elements), splits), arguments, configs)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    sum_partials(sums[:, None], (grad_weight,))
    if bias_sums is None:
        return grad_weight, None
    grad_bias = torch.empty(width, dtype=weight.dtype, device=grad.device)
    sum_partials(bias_sums[:, None], (grad_bias,))
    return grad_weight, grad_bias


def _volume_gradient(grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
    grad_volume = torch.zeros(volume.shape, dtype=volume.dtype, device=volume.device)
    elements, rows = weight[0].numel(), grad.shape[0] * grad.shape[1]
    order, runs = (None, None) if ids is None else _runs(ids, token_count(volume, weight.shape[2:]))
    arguments = {
        "grad_volume_ptr": grad_volume,
        "grad_ptr": grad,
        "weight_ptr": weight.contiguous(),
        "order_ptr": order,
        "runs_ptr": runs,
        "ROWS": rows,
        "K": grad.shape[1],
        "D": weight.shape[0],
        **strides("grad", "bkd", grad),
        **patch_arguments(grad_volume, weight.shape[2:]),
        "ids_ptr": ids,
        **strides("ids", "bk", ids),
        "PRECISION": precision_of(weight.dtype, volume.device),
    }
    table = tiles(weight.dtype, volume.device, rows, elements)
    configs = tuple(config._replace(registers=255) for config in table)  # as for the weight
    launch(_patch_embed_volume_gradient, lambda c: (tile_count(c, rows, elements),), arguments, configs)
    return grad_volume


def _runs(ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Rows ordered by sample and token, and for the first of each token how many rows have it, 0 for the others."""
    key = (ids + torch.arange(len(ids), device=ids.device)[:, None] * tokens).flatten()
    ordered, order = key.sort(stable=True)
    place = torch.arange(len(key), device=ids.device)
    first, end = torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
    return order, torch.where(first == place, end - place, 0)


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
    # Neighbouring programs share their rows: the patches come from memory once, the weight stays in the L2 cache.
    columns = tl.cdiv(D, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < ROWS)[:, None] & (column < D)[None, :]
    # Rows and columns past the end compute the last one again, so that the loop needs no mask for them.
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
    grad_bias_ptr,     # [SPLITS, D] likewise, or None
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
    order_ptr,         # [B*K] int64 rows, those of one token of one sample together; None: each row has its own token
    runs_ptr,          # [B*K] int64 for the first row of a token how many have it, 0 for the others; None likewise
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
    # A patch is written by its token's first row, which adds the others in their order: no atomics, one result.
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

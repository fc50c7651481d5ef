"""Input sequence of the decoder on the GPU; each output element is written once, each gradient element read once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.config import Config, Launch, element_config, next_power_of_2, strides
from ..gpu.launch import launch
from ..gpu.partial_sums import sum_partials

FORWARD_TILES = ((8, 128), (8, 256), (16, 128))
BACKWARD_TILE = (8, 128)  # of each of the samples below: two sums of this size in registers; a program loops over more
SAMPLES = 4  # that a program loads at once in backward; one by one, the threads of batch 8 would not keep memory busy


def decoder_tokens_forward(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> Tensor:
    """Return `decoder_tokens_reference` in one launch, in the dtype that visible tokens and position promote to."""
    (batch, keep, width), tokens = visible.shape, ids_restore.shape[1]
    dtype = torch.promote_types(visible.dtype, position.dtype)
    out = visible.new_empty(batch, tokens, width, dtype=dtype)
    tensors = out, visible, mask_token, ids_restore, position
    sizes = batch, keep, tokens, width
    launch(_describe_forward, tensors, (*sizes, *[tensor.stride() for tensor in tensors[1:]]))
    return out


def decoder_tokens_backward(grad: Tensor, ids_restore: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients with respect to visible tokens, mask token and position, in two launches; deterministic."""
    batch, tokens, width = grad.shape
    grad_visible = grad.new_empty(batch, keep, width)
    grad_mask_token, grad_position = grad.new_empty(width), grad.new_empty(tokens, width)
    partials = grad.new_empty(-(-tokens // BACKWARD_TILE[0]), 1, width, dtype=torch.float32)
    tensors = grad_visible, grad_position, partials, grad, ids_restore
    launch(_describe_backward, tensors, (batch, keep, tokens, width, grad.stride(), ids_restore.stride()))
    sum_partials(partials, (grad_mask_token,))
    return grad_visible, grad_mask_token, grad_position


def _describe_forward(
    target: str,
    batch: int,
    keep: int,
    tokens: int,
    width: int,
    visible: tuple[int, ...],
    mask_token: tuple[int, ...],
    restore: tuple[int, ...],
    position: tuple[int, ...],
) -> Launch:
    arguments = {
        "N": tokens,
        "K": keep,
        "D": width,
        **strides("visible", "bkd", visible),
        **strides("mask_token", "d", mask_token),
        **strides("restore", "bn", restore),
        **strides("position", "nd", position),
    }
    return Launch(
        _decoder_tokens_forward,
        lambda c: (batch * triton.cdiv(tokens, c["BLOCK_N"]) * triton.cdiv(width, c["BLOCK_D"]),),
        arguments,
        tuple(_config(*tile, target) for tile in FORWARD_TILES),
    )


def _describe_backward(
    target: str,
    batch: int,
    keep: int,
    tokens: int,
    width: int,
    grad: tuple[int, ...],
    restore: tuple[int, ...],
) -> Launch:
    arguments = {
        "B": batch,
        "N": tokens,
        "K": keep,
        "D": width,
        **strides("grad", "bnd", grad),
        **strides("restore", "bn", restore),
    }
    return Launch(
        _decoder_tokens_backward,
        lambda c: (triton.cdiv(tokens, c["BLOCK_N"]) * triton.cdiv(width, c["BLOCK_D"]),),
        arguments,
        (_config(*BACKWARD_TILE, target, BLOCK_B=min(SAMPLES, next_power_of_2(batch))),),
    )


def _config(tokens: int, channels: int, target: str, **samples: int) -> Config:
    constants = {**samples, "BLOCK_N": tokens, "BLOCK_D": channels}
    return element_config(constants, math.prod(constants.values()), target)


@triton.jit
def _decoder_tokens_forward(
    out_ptr,           # [B, N, D]
    visible_ptr,       # [B, K, D]
    mask_token_ptr,    # [D]
    restore_ptr,       # [B, N] int64, < K: visible row, else masked
    position_ptr,      # [N, D]
    N, K, D,
    stride_visible_b, stride_visible_k, stride_visible_d, stride_mask_token_d,
    stride_restore_b, stride_restore_n, stride_position_n, stride_position_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    blocks, columns = tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_D)
    b = (tl.program_id(0) // (blocks * columns)).to(tl.int64)
    n = (tl.program_id(0) // columns % blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d = (tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    has_token, has_channel = n < N, d < D
    inside = has_token[:, None] & has_channel[None, :]
    row = tl.load(restore_ptr + b * stride_restore_b + n * stride_restore_n, mask=has_token, other=0)
    seen = row < K
    visible_at = visible_ptr + b * stride_visible_b + row[:, None] * stride_visible_k + d[None, :] * stride_visible_d
    visible = tl.load(visible_at, mask=inside & seen[:, None], other=0).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + d * stride_mask_token_d, mask=has_channel, other=0)
    # Rounded to the dtype of the visible tokens, as in the reference.
    mask_token = mask_token.to(visible_ptr.dtype.element_ty).to(tl.float32)
    position_at = position_ptr + n[:, None] * stride_position_n + d[None, :] * stride_position_d
    position = tl.load(position_at, mask=inside, other=0).to(tl.float32)
    token = tl.where(seen[:, None], visible, mask_token[None, :]) + position
    tl.store(out_ptr + (b * N + n[:, None]) * D + d[None, :], token.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _decoder_tokens_backward(
    grad_visible_ptr,  # [B, K, D]
    grad_position_ptr,  # [N, D]
    grad_mask_ptr,     # [programs along N, D] partial sums
    grad_ptr,          # [B, N, D]
    restore_ptr,       # [B, N] int64
    B, N, K, D,
    stride_grad_b, stride_grad_n, stride_grad_d, stride_restore_b, stride_restore_n,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    columns = tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0) // columns
    n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d = (tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    has_token, has_channel = n < N, d < D
    position_sum = tl.zeros((BLOCK_B, BLOCK_N, BLOCK_D), tl.float32)
    mask_sum = tl.zeros((BLOCK_B, BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, B, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        has_row = (b < B)[:, None] & has_token[None, :]
        row_at = restore_ptr + b[:, None] * stride_restore_b + n[None, :] * stride_restore_n
        row = tl.load(row_at, mask=has_row, other=0)
        inside = has_row[:, :, None] & has_channel[None, None, :]
        grad_at = grad_ptr + (b[:, None] * stride_grad_b + n[None, :] * stride_grad_n)[:, :, None]
        grad = tl.load(grad_at + d[None, None, :] * stride_grad_d, mask=inside, other=0)
        seen = (row < K)[:, :, None]
        visible_at = grad_visible_ptr + ((b[:, None] * K + row) * D)[:, :, None] + d[None, None, :]
        tl.store(visible_at, grad.to(grad_visible_ptr.dtype.element_ty), mask=inside & seen)
        position_sum += grad.to(tl.float32)
        mask_sum += tl.where(seen, 0.0, grad.to(tl.float32))
    inside = has_token[:, None] & has_channel[None, :]
    position_at = grad_position_ptr + n[:, None] * D + d[None, :]
    tl.store(position_at, tl.sum(position_sum, axis=0).to(grad_position_ptr.dtype.element_ty), mask=inside)
    mask_total = tl.sum(tl.sum(mask_sum, axis=0), axis=0)
    tl.store(grad_mask_ptr + block.to(tl.int64) * D + d, mask_total, mask=has_channel)

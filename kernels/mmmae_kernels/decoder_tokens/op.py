"""The decoder's input: visible tokens back in place, the mask token elsewhere, position added."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_device, check_floating, check_ids, check_rank, check_shape
from ..dispatch import in_debug_mode, kernels, native_refuses, native_unavailable, triton_refuses, triton_unavailable
from .reference import decoder_tokens_reference


def decoder_tokens(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> Tensor:
    """Put visible tokens back among mask tokens and add the position of each.

    Args:
        visible: `[B, K, D]`.
        mask_token: `[D]`.
        ids_restore: `[B, N]` int64, a permutation of 0..N-1 in each row; below K it names a visible row, else the token
            is masked.
        position: `[N, D]`.

    Returns:
        `[B, N, D]`.

    Raises:
        ValueError: shapes or devices do not fit, or an id is outside 0..N-1 (checked on the CPU and in debug mode).
    """
    check_rank("visible", visible, "[B, K, D]")
    check_floating("visible", visible)
    check_rank("ids_restore", ids_restore, "[B, N]")
    batch, keep, width = visible.shape
    tokens = ids_restore.shape[1]
    if keep > tokens:
        raise ValueError(f"visible has {keep} tokens, allowed is at most {tokens} as in ids_restore")
    check_shape("ids_restore", ids_restore, (batch, tokens))
    check_shape("mask_token", mask_token, (width,))
    check_shape("position", position, (tokens, width))
    for name, tensor in (("mask_token", mask_token), ("ids_restore", ids_restore), ("position", position)):
        check_device(name, tensor, visible.device)
    check_ids("ids_restore", ids_restore, tokens)
    if in_debug_mode() and not torch.compiler.is_compiling():
        ordered = torch.arange(tokens, device=ids_restore.device).expand_as(ids_restore)
        if not torch.equal(ids_restore.sort(dim=1).values, ordered):
            raise ValueError("ids_restore names a token twice, expected is a permutation in each row")
    function = dispatch.choose("decoder_tokens", visible, mask_token, ids_restore, position)
    sequence: Tensor = function(visible, mask_token, ids_restore, position)
    return sequence


@torch.library.custom_op("mmmae::decoder_tokens", mutates_args=())
def _fused(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor, backend: str) -> Tensor:
    """`[B, N, D]` in the type that visible tokens and position promote to."""
    forward = kernels("decoder_tokens", backend).decoder_tokens_forward
    sequence: Tensor = forward(visible, mask_token, ids_restore, position)
    return sequence


@_fused.register_fake
def _(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor, backend: str) -> Tensor:
    dtype = torch.promote_types(visible.dtype, position.dtype)
    return visible.new_empty(*ids_restore.shape, visible.shape[2], dtype=dtype)


@torch.library.custom_op("mmmae::decoder_tokens_backward", mutates_args=())
def _fused_backward(grad: Tensor, ids_restore: Tensor, keep: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by visible tokens, mask token and position."""
    backward = kernels("decoder_tokens", backend).decoder_tokens_backward
    grads: tuple[Tensor, Tensor, Tensor] = backward(grad, ids_restore, keep)
    return grads


@_fused_backward.register_fake
def _(grad: Tensor, ids_restore: Tensor, keep: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = grad.shape
    return grad.new_empty(batch, keep, width), grad.new_empty(width), grad.new_empty(tokens, width)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    visible, mask_token, ids_restore, position, ctx.backend = inputs
    ctx.save_for_backward(ids_restore)
    ctx.keep, ctx.dtypes = visible.shape[1], [tensor.dtype for tensor in (visible, mask_token, position)]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, None]:
    (ids_restore,) = ctx.saved_tensors
    grads = _fused_backward(grad, ids_restore, ctx.keep, ctx.backend)
    by_visible, by_mask_token, by_position = (part.to(dtype) for part, dtype in zip(grads, ctx.dtypes, strict=True))
    return by_visible, by_mask_token, None, by_position, None


_fused.register_autograd(_backward, setup_context=_keep)


def _native_runs(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> dispatch.Reason:
    return native_refuses((("visible", visible), ("mask_token", mask_token), ("position", position)))


def _triton_runs(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> dispatch.Reason:
    return triton_refuses((("visible", visible), ("mask_token", mask_token), ("position", position)))


dispatch.register(
    "decoder_tokens",
    triton=dispatch.Implementation(functools.partial(_fused, backend="triton"), _triton_runs, triton_unavailable),
    native=dispatch.Implementation(functools.partial(_fused, backend="native"), _native_runs, native_unavailable),
    eager=dispatch.Implementation(decoder_tokens_reference),
)

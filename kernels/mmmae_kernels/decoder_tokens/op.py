"""Input sequence of the decoder: visible tokens in their places, the mask token elsewhere, plus positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_device, check_floating, check_ids, check_rank, check_shape, check_vector, is_readable
from ..dispatch import Arguments, declare, in_debug_mode, native_refuses, triton_refuses
from ..operators import declare_operator, fast_apply, first_derivative_only, kernels_for
from .reference import decoder_tokens_reference


def decoder_tokens(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> Tensor:
    """Put visible tokens back in their places among mask tokens, and add each token's position embedding.

    Args:
        visible: `[B, K, D]`.
        mask_token: `[D]`.
        ids_restore: `[B, N]` int64, a permutation of 0..N-1 in each row. A number below K is a row of `visible`, a
            larger one means that the token is masked. See `random_masking`.
        position: `[N, D]`.

    Returns:
        `[B, N, D]` in the dtype that `visible` and `position` promote to.

    Raises:
        ValueError: shapes or devices do not match, or an id is outside 0..N-1 (checked on the CPU and in debug mode).

    Example:
        >>> mask = random_masking(batch=2, tokens=8, keep=2, seed=0)
        >>> visible, mask_token, position = torch.randn(2, 2, 4), torch.zeros(4), torch.randn(8, 4)
        >>> decoder_tokens(visible, mask_token, mask.ids_restore, position).shape
        torch.Size([2, 8, 4])
    """
    check_rank("visible", visible, "[B, K, D]")
    check_floating("visible", visible)
    check_rank("ids_restore", ids_restore, "[B, N]")
    batch, keep, width = visible.shape
    tokens = ids_restore.shape[1]
    if keep > tokens:
        raise ValueError(f"visible has {keep} tokens, expected at most {tokens} as in ids_restore")
    check_shape("ids_restore", ids_restore, (batch, tokens))
    check_vector("mask_token", mask_token, width, visible.device)
    check_shape("position", position, (tokens, width))
    check_floating("position", position)
    check_device("position", position, visible.device)
    check_device("ids_restore", ids_restore, visible.device)
    check_ids("ids_restore", ids_restore, tokens)
    if in_debug_mode() and is_readable(ids_restore):
        ordered = torch.arange(tokens, device=ids_restore.device).expand_as(ids_restore)
        if not torch.equal(ids_restore.sort(dim=1).values, ordered):
            raise ValueError("ids_restore contains a number twice, expected a permutation in each row")
    arguments = (visible, mask_token, ids_restore, position)
    key = (visible.device, visible.dtype, mask_token.dtype, position.dtype)
    sequence: Tensor = DECODER_TOKENS.select(key, *arguments)(*arguments)
    return sequence


def _by_kernels(backend: str) -> Callable[..., Tensor]:
    def run(*arguments: Tensor) -> Tensor:
        sequence: Tensor = _apply(*arguments, backend)
        return sequence

    return run


class _DecoderTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor, backend: str
    ) -> Tensor:
        ctx.save_for_backward(ids_restore)
        ctx.keep, ctx.backend = visible.shape[1], backend
        ctx.dtypes = [tensor.dtype for tensor in (visible, mask_token, position)]
        forward = kernels_for(visible, backend).decoder_tokens_forward
        sequence: Tensor = forward(visible, mask_token, ids_restore, position)
        return sequence

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids_restore,) = ctx.saved_tensors
        gradients = kernels_for(grad, ctx.backend).decoder_tokens_backward(grad, ids_restore, ctx.keep)
        grad_visible, grad_mask_token, grad_position = (
            gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return grad_visible, grad_mask_token, None, grad_position, None


_apply = fast_apply(_DecoderTokens)


def _forward_fake(visible: Tensor, *rest: Tensor) -> Tensor:
    _, ids_restore, position = rest
    dtype = torch.promote_types(visible.dtype, position.dtype)
    return visible.new_empty(*ids_restore.shape, visible.shape[2], dtype=dtype)


# Returns `[B, N, D]` in the dtype that visible tokens and position promote to.
declare_operator(
    "decoder_tokens",
    "decoder_tokens_forward(Tensor visible, Tensor mask_token, Tensor ids_restore, Tensor position) -> Tensor",
    _forward_fake,
    name="decoder_tokens",
)


def _backward_fake(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    keep = rest[-1]
    batch, tokens, width = grad.shape
    return grad.new_empty(batch, keep, width), grad.new_empty(width), grad.new_empty(tokens, width)


# Returns the gradients of visible tokens, mask token and position.
declare_operator(
    "decoder_tokens",
    "decoder_tokens_backward(Tensor grad, Tensor ids_restore, SymInt keep) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


def _tensors(arguments: Arguments) -> list[tuple[str, Tensor]]:
    return [(name, arguments[name]) for name in ("visible", "mask_token", "position")]


DECODER_TOKENS = declare(
    "decoder_tokens",
    decoder_tokens_reference,
    _by_kernels,
    native_refuses=lambda arguments: native_refuses(_tensors(arguments)),
    triton_refuses=lambda arguments: triton_refuses(_tensors(arguments)),
)

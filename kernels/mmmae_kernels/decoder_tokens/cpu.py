"""Input sequence of the decoder on the CPU, and its gradients in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from ..cpu import library

_forward = library.function("decoder_tokens")
_backward = library.function("decoder_tokens_backward")


def decoder_tokens_forward(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> Tensor:
    """Return `decoder_tokens_reference`, `[B, N, D]`, computed without intermediate tensors.

    Raises:
        ValueError: an id is outside 0..N-1.
    """
    batch, keep, width = visible.shape
    tokens = ids_restore.size(1)
    out = visible.new_empty(batch, tokens, width, dtype=torch.promote_types(visible.dtype, position.dtype))
    # Rounded to the dtype of the visible tokens, as in the reference.
    visible, mask_token = library.contiguous_rows(visible), library.float_vector(mask_token.to(visible.dtype))
    position = library.contiguous_rows(position)
    _forward(
        visible.data_ptr(),
        visible.stride()[:2],
        mask_token.data_ptr(),
        ids_restore.data_ptr(),
        ids_restore.stride(),
        position.data_ptr(),
        position.stride(0),
        out.data_ptr(),
        (library.DTYPES[visible.dtype], library.DTYPES[position.dtype], library.DTYPES[out.dtype]),
        (batch, keep, tokens, width),
        get_num_threads(),
    )
    return out


def decoder_tokens_backward(grad: Tensor, ids_restore: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of visible tokens, mask token and position.

    Args:
        grad: `[B, N, D]`, any strides.
        ids_restore: `[B, N]`, not necessarily a permutation. The gradient of a visible row is the sum over the tokens
            that refer to it, in order, and 0 if there is none.
        keep: number of visible tokens K.

    Raises:
        ValueError: an id is outside 0..N-1.
    """
    batch, tokens, width = grad.shape
    grad_visible = grad.new_empty(batch, keep, width)
    grad_mask_token = grad.new_empty(width, dtype=torch.float32)
    grad_position = grad.new_empty(tokens, width)
    grad = library.contiguous_rows(grad)
    _backward(
        grad.data_ptr(),
        grad.stride()[:2],
        ids_restore.data_ptr(),
        ids_restore.stride(),
        grad_visible.data_ptr(),
        grad_mask_token.data_ptr(),
        grad_position.data_ptr(),
        library.DTYPES[grad.dtype],
        (batch, keep, tokens, width),
        get_num_threads(),
    )
    return grad_visible, grad_mask_token.to(grad.dtype), grad_position

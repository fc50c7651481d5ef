"""The decoder's input on the CPU, and its gradients in one pass, float32."""

from __future__ import annotations

from torch import Tensor

from ..cpu import library


def decoder_tokens_forward(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> Tensor:
    """`[B, N, D]`: `decoder_tokens_reference` without a copy between.

    Raises:
        ValueError: a shape, dtype or device does not fit, or an id is outside 0..N-1.
    """
    visible = library.rows_of(visible)
    out = visible.new_empty(*ids_restore.shape, visible.shape[-1])
    library.call("decoder_tokens", visible, library.rows_of(mask_token), ids_restore, library.rows_of(position), out)
    return out


def decoder_tokens_backward(grad: Tensor, ids_restore: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of visible tokens, mask token and position.

    Args:
        grad: `[B, N, D]`, any strides.
        ids_restore: `[B, N]`; it need not be a permutation. The gradient of a visible row is the sum over the tokens
            that name it, in their order, and 0 if none does.
        keep: visible tokens K.

    Raises:
        ValueError: as `decoder_tokens_forward` does.
    """
    grad = library.rows_of(grad)
    if grad.dim() != 3 or keep < 0:
        raise ValueError(f"grad has shape {list(grad.shape)}, expected is [B, N, D], and keep is {keep}")
    batch, tokens, width = grad.shape
    grad_visible, grad_mask_token = grad.new_empty(batch, keep, width), grad.new_empty(width)
    grad_position = grad.new_empty(tokens, width)
    library.call("decoder_tokens_backward", grad, ids_restore, grad_visible, grad_mask_token, grad_position)
    return grad_visible, grad_mask_token, grad_position

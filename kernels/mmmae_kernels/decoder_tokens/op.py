"""The decoder's input: visible tokens back in place, the mask token elsewhere, position added."""

from __future__ import annotations

from torch import Tensor

from .. import registry
from ..checks import check_device, check_floating, check_ids, check_rank, check_shape
from .reference import decoder_tokens_reference


def decoder_tokens(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> Tensor:
    """Put visible tokens back among mask tokens and add the position of each.

    Args:
        visible: `[B, K, D]`.
        mask_token: `[D]`.
        ids_restore: `[B, N]` int64; below K it names a visible row, else the token is masked.
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
    function = registry.choose("decoder_tokens", visible, mask_token, ids_restore, position)
    sequence: Tensor = function(visible, mask_token, ids_restore, position)
    return sequence


registry.register("decoder_tokens", eager=registry.Implementation(decoder_tokens_reference))

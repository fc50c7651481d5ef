"""The cases of all ops but attention, whose backends have tests of their own; see `Case` for what is done with one."""

from __future__ import annotations

from tests.cases import (
    add_layer_norm,
    conditioning,
    decoder_tokens,
    far_apart,
    gelu_linear,
    masked_loss,
    norm_linear,
    patch_embed,
    transformer_block,
)

CASES = [
    *patch_embed.CASES,
    *masked_loss.CASES,
    *decoder_tokens.CASES,
    *add_layer_norm.CASES,
    *norm_linear.CASES,
    *gelu_linear.CASES,
    *transformer_block.CASES,
    *conditioning.CASES,
]
FAR = far_apart.CASES

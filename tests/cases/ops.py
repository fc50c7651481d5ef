"""The cases of all ops, but of attention the merging alone: its backends have tests of their own. See `Case`."""

from __future__ import annotations

from tests.cases import (
    add_layer_norm,
    attention,
    conditioning,
    decoder_tokens,
    far_apart,
    gelu_linear,
    masked_loss,
    norm_linear,
    patch_embed,
    stacked_blocks,
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
    *stacked_blocks.CASES,
    *conditioning.CASES,
    *attention.MERGED,
]
FAR = far_apart.CASES

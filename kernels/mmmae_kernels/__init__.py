"""Fused kernels of a masked autoencoder on volumes; each call runs on the fastest backend that supports it."""

from . import counting  # noqa: F401  # registers the operators' costs with torch's FLOP counter
from .add_layer_norm import add_layer_norm
from .attention import attention, concat_attention
from .decoder_tokens import decoder_tokens
from .dispatch import explain, use_backend
from .gelu_linear import gelu_linear
from .masked_loss import masked_l2_loss, patch_l2_loss
from .norm_linear import norm_linear
from .patch_embed import patch_embed, patchify
from .random_masking import TokenMask, random_masking
from .transformer_block import BlockWeights, transformer_block

__all__ = [
    "BlockWeights",
    "TokenMask",
    "add_layer_norm",
    "attention",
    "concat_attention",
    "decoder_tokens",
    "explain",
    "gelu_linear",
    "masked_l2_loss",
    "norm_linear",
    "patch_embed",
    "patch_l2_loss",
    "patchify",
    "random_masking",
    "transformer_block",
    "use_backend",
]

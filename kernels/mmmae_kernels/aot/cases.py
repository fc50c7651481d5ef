"""The calls whose launches are compiled ahead of time; each op makes its own in `costs.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..add_layer_norm import costs as add_layer_norm
from ..attention import costs as attention
from ..decoder_tokens import costs as decoder_tokens
from ..gelu_linear import costs as gelu_linear
from ..masked_loss import costs as masked_loss
from ..patch_embed import costs as patch_embed
from ..random_masking import costs as random_masking
from ..shapes import BANDS, BATCH, DECODER_WIDTH, DTYPES, HIDDEN, KEEP, PATCH, SIZE, TOKENS, WIDTH

__all__ = ["BANDS", "BATCH", "CASES", "DECODER_WIDTH", "DTYPES", "HIDDEN", "KEEP", "PATCH", "SIZE", "TOKENS", "WIDTH"]

CASES: dict[str, Callable[[torch.dtype], None]] = {
    **random_masking.COMPILED,
    **patch_embed.COMPILED,
    **masked_loss.COMPILED,
    **decoder_tokens.COMPILED,
    **add_layer_norm.COMPILED,
    **gelu_linear.COMPILED,
    **attention.COMPILED,
}

"""The definition of `decoder_tokens`: append mask tokens, restore the order, add positions."""

from __future__ import annotations

import torch
from torch import Tensor


def decoder_tokens_reference(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> Tensor:
    """Return the sequence of all tokens: visible ones in their places, the mask token elsewhere, plus positions."""
    batch, keep, width = visible.shape
    masked = mask_token.to(visible.dtype).expand(batch, ids_restore.shape[1] - keep, width)
    shuffled = torch.cat([visible, masked], dim=1)
    return shuffled.gather(1, ids_restore[:, :, None].expand(-1, -1, width)) + position

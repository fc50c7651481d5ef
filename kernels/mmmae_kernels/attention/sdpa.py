"""Attention by PyTorch's scaled_dot_product_attention: its flash, cuDNN, memory-efficient and CPU flash kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> Tensor:
    """See `attention_eager`. Heads are transposed as views: no kernel of SDPA copies for it."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if key_present is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    served = key_present.any(1)
    # A row without keys is NaN in some of SDPA's kernels: give it all keys, then drop its answer.
    mask = key_present | ~served[:, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)
    return torch.where(served[:, None, None, None], mixed, torch.zeros_like(mixed))

"""The definition of attention, with the scores in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_eager(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> Tensor:
    """Compute `softmax(q k^T / sqrt(d)) v` over the present keys; zero for a sample without keys."""
    if key_present is not None:  # absent keys and values may contain NaN, and 0 times NaN is NaN
        k, v = (torch.where(key_present[:, :, None, None], tensor, 0.0) for tensor in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if key_present is None:
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    absent = ~key_present[:, None, None, :]
    weights = scores.masked_fill(absent, -math.inf).softmax(-1).masked_fill(absent, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)

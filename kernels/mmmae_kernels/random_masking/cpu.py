"""Random masking on the CPU: compiled noise and sort, one sample a task."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from ..cpu import library

_forward = library.function("random_masking")


def random_masking_forward(
    batch: int, tokens: int, keep: int, seed: Tensor, device: torch.device, first_sample: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same tables as `random_masking_reference`, bit for bit; `device` is the CPU.

    Raises:
        ValueError: there are 2^32 tokens or more, or a sample number is outside 0..2^63-1.
    """
    ids_keep, ids_masked, ids_restore = (
        torch.empty(batch, count, dtype=torch.int64, device=device) for count in (keep, tokens - keep, tokens)
    )
    _forward(
        int(seed),
        first_sample,
        ids_keep.data_ptr(),
        ids_masked.data_ptr(),
        ids_restore.data_ptr(),
        (batch, tokens, keep),
        get_num_threads(),
    )
    return ids_keep, ids_masked, ids_restore

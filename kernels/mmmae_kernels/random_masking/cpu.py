"""Random masking on the CPU: noise and sort compiled, one sample after another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu import library


def random_masking_forward(
    batch: int, tokens: int, keep: int, seed: Tensor, device: torch.device, first_sample: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `random_masking_reference` gives, bit for bit.

    Raises:
        ValueError: a count or sample number is out of range, the seed is no int64 scalar, or `device` is not the CPU.
    """
    if device.type != "cpu":
        raise ValueError(f"device is {device}, native kernels run on the CPU")
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise ValueError(f"seed is a {seed.dtype} tensor of shape {list(seed.shape)}, expected is an int64 scalar")
    if batch < 0 or not 0 <= keep <= tokens:
        raise ValueError(
            f"batch, tokens, keep are {batch}, {tokens}, {keep}, expected is batch >= 0, 0 <= keep <= tokens"
        )
    tables = [torch.empty(batch, size, dtype=torch.int64) for size in (keep, tokens - keep, tokens)]
    library.call("random_masking", int(seed), first_sample, *tables)
    ids_keep, ids_masked, ids_restore = tables
    return ids_keep, ids_masked, ids_restore

"""What automatic mixed precision asks of a call."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocast(tensor: Tensor) -> bool:
    """Return whether autocast is on for the tensor's device."""
    return autocast_dtype(tensor.device.type) is not None


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return autocast's type where it is on for devices of a type, else None; `meta` has none, and torch no answer."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of a product with `weight`: autocast's for float types below float64, else its own."""
    dtype = autocast_dtype(weight.device.type)
    return weight.dtype if dtype is None or weight.dtype == torch.float64 else dtype

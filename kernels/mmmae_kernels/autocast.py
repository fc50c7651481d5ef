"""Dtypes under automatic mixed precision."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocast(tensor: Tensor) -> bool:
    """Return whether autocast is enabled for the tensor's device."""
    return autocast_dtype(tensor.device.type) is not None


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return autocast's dtype for a device type, or None if it is disabled there; it never is enabled for `meta`."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product with `weight`: autocast's if it is enabled and `weight` is not float64."""
    dtype = autocast_dtype(weight.device.type)
    return weight.dtype if dtype is None or weight.dtype == torch.float64 else dtype

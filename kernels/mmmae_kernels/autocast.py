"""What automatic mixed precision asks of a call."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    return torch.is_autocast_enabled(tensor.device.type)


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """The type that a product with `weight` is computed in: autocast's for float types below float64, else its own."""
    if is_autocast(weight) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype

"""The definition of `gelu_linear`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def gelu_linear_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of the exact GELU."""
    return F.linear(F.gelu(hidden), weight, bias)

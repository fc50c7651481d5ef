"""The definition of `gelu_linear`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def gelu_linear_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_bias: Tensor | None = None
) -> Tensor:
    """Return a linear layer of the exact GELU of `hidden + hidden_bias`, added in the dtype of `hidden`."""
    if hidden_bias is not None:
        hidden = hidden + hidden_bias.to(hidden.dtype)
    return F.linear(F.gelu(hidden), weight, bias)

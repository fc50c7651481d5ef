"""The definition of `norm_linear`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..add_layer_norm.reference import add_layer_norm_reference


def norm_linear_reference(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    residual_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum, and a linear layer of its layer norm."""
    total, norm = add_layer_norm_reference(x, residual, norm_weight, norm_bias, epsilon, residual_bias)
    return total, F.linear(norm, weight, bias)

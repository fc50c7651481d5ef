"""The definition of `add_layer_norm`: add, then normalise over channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autocast import is_autocast


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    residual_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum and its layer norm; for half dtypes torch computes the statistics in float32.

    Under autocast the norm is float32 on every device; on the CPU autocast has no rule for it.
    """
    if residual is not None and residual_bias is not None:
        residual = residual + residual_bias.to(residual.dtype)
    total = x if residual is None else x + residual
    summed = total.to(torch.promote_types(total.dtype, torch.float32)) if is_autocast(total) else total
    return total, F.layer_norm(summed, weight.shape, weight, bias, epsilon)

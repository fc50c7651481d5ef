"""GELU and its derivative on the CPU in one pass, float32: what a linear layer that keeps no activated input needs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def gelu_backward(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """`grad * gelu'(hidden)` and `gelu(hidden)`, the exact GELU.

    Args:
        grad, hidden: `[..., H]`, any strides.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if hidden.dim() == 0:
        raise ValueError("hidden has shape [], expected is [..., H]")
    native.check("hidden", hidden, hidden.shape)
    native.check("grad", grad, hidden.shape)
    rows = native.in_three_axes(hidden)
    grad_hidden, activated = torch.empty(rows.shape), torch.empty(rows.shape)
    native.call("gelu_backward", native.in_three_axes(grad), rows, grad_hidden, activated)
    return grad_hidden.view(hidden.shape), activated.view(hidden.shape)

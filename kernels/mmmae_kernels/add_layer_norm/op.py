"""Residual add and layer norm: the two lines between any two sublayers of a pre-norm transformer."""

from __future__ import annotations

from torch import Tensor

from .. import registry
from ..checks import check_device, check_floating, check_shape
from .reference import add_layer_norm_reference


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`total = x + residual` and `layer_norm(total) * weight + bias`.

    Args:
        x: `[..., D]`.
        residual: of the same shape, or None for no addition.
        weight, bias: `[D]`.
        epsilon: added to the variance; 1e-6 as in ViT and MAE.

    Returns:
        The sum (`x` itself without residual) and the norm, both `[..., D]`.

    Raises:
        ValueError: shapes or devices do not fit, or a tensor holds no floating point numbers.
    """
    check_floating("x", x)
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        check_device("residual", residual, x.device)
        check_floating("residual", residual)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_shape(name, tensor, (x.shape[-1],))
        check_device(name, tensor, x.device)
        check_floating(name, tensor)
    function = registry.choose("add_layer_norm", x, residual, weight, bias, epsilon)
    total, norm = function(x, residual, weight, bias, epsilon)
    return total, norm


registry.register("add_layer_norm", eager=registry.Implementation(add_layer_norm_reference))

"""Residual add and layer norm in one pass."""

from .op import add_layer_norm

__all__ = ["add_layer_norm"]

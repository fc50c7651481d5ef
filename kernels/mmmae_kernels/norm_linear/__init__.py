"""Residual add, layer norm and a linear layer, without saving the norm for backward."""

from .op import norm_linear

__all__ = ["norm_linear"]

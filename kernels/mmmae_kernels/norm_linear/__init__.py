"""Residual add, layer norm and the linear layer after it, lean in memory."""

from .op import norm_linear

__all__ = ["norm_linear"]

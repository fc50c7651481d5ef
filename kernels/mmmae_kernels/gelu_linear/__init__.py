"""GELU and the linear layer after it, lean in memory."""

from .op import gelu_linear

__all__ = ["gelu_linear"]

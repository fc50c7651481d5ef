"""GELU and a linear layer, without saving the activation for backward."""

from .op import gelu_linear

__all__ = ["gelu_linear"]

"""Attention through the best backend that serves the call."""

from .op import attention

__all__ = ["attention"]

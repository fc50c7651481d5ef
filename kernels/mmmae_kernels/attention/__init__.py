"""Attention through the best backend that serves the call."""

from .op import attention, concat_attention

__all__ = ["attention", "concat_attention"]

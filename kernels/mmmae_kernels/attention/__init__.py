"""Attention by the preferred backend that supports the call."""

from .op import attention, concat_attention

__all__ = ["attention", "concat_attention"]

"""Patch embedding of chosen tokens."""

from .op import patch_embed, patchify

__all__ = ["patch_embed", "patchify"]

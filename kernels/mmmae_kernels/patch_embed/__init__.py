"""Patch embedding of chosen tokens."""

from .op import patch_embed
from .patchify import patchify

__all__ = ["patch_embed", "patchify"]

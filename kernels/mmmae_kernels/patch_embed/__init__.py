"""Patch embedding of all or some tokens."""

from .op import patch_embed
from .patches import patchify

__all__ = ["patch_embed", "patchify"]

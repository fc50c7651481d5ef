"""The decoder's input sequence."""

from .op import decoder_tokens

__all__ = ["decoder_tokens"]

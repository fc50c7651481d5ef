"""Input sequence of the decoder."""

from .op import decoder_tokens

__all__ = ["decoder_tokens"]

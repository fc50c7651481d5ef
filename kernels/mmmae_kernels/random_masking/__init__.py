"""Random masks as a function of (seed, sample, token) alone."""

from .op import TokenMask, random_masking, seed_tensor

__all__ = ["TokenMask", "random_masking", "seed_tensor"]

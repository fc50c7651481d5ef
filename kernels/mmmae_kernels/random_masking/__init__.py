"""Random masks that depend only on seed, sample number and token number."""

from .op import TokenMask, random_masking, seed_tensor

__all__ = ["TokenMask", "random_masking", "seed_tensor"]

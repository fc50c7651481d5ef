"""A pre-norm transformer block as one op."""

from . import conditioning  # noqa: F401  # declares the op `conditioning`
from .op import transformer_block
from .reference import BlockWeights

__all__ = ["BlockWeights", "transformer_block"]

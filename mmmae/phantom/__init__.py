"""Generated subjects: retinas whose pigments and vessels are known, for trials and tests."""

from .files import write_phantom
from .subjects import Phantom

__all__ = ["Phantom", "write_phantom"]

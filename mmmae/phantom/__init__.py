"""Generated subjects for demos and tests: images of retinas with known pigments and vessels."""

from .files import write_phantom
from .subjects import Phantom

__all__ = ["Phantom", "write_phantom"]

"""Multi-modal guided masked autoencoders for hyperspectral images, made fast."""

from .config import MMMAEConfig
from .encoder import HSIEncoder, LinearClassifier
from .fast import FastModel, fast_model
from .inputs import Output
from .profiling import profile
from .reference import ReferenceModel, reference_model
from .tuning import tune_cpu

__version__ = "0.1.0"

__all__ = [
    "FastModel",
    "HSIEncoder",
    "LinearClassifier",
    "MMMAEConfig",
    "Output",
    "ReferenceModel",
    "fast_model",
    "profile",
    "reference_model",
    "tune_cpu",
]

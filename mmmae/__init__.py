"""Multi-modal guided masked autoencoders for hyperspectral images, made fast."""

from .config import MMMAEConfig
from .encoder import HSIEncoder, LinearClassifier
from .export import export_encoder
from .fast import FastModel, fast_model
from .finetuned import load_finetuned
from .heads import SegmentationModel
from .inputs import Output
from .profiling import profile
from .reference import ReferenceModel, reference_model
from .spectralgpt import import_spectralgpt
from .training import TrainingStep
from .tuning import tune_cpu

__version__ = "0.1.0"

__all__ = [
    "FastModel",
    "HSIEncoder",
    "LinearClassifier",
    "MMMAEConfig",
    "Output",
    "ReferenceModel",
    "SegmentationModel",
    "TrainingStep",
    "export_encoder",
    "fast_model",
    "import_spectralgpt",
    "load_finetuned",
    "profile",
    "reference_model",
    "tune_cpu",
]

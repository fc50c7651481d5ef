"""Fast multi-modal masked autoencoders for hyperspectral images, guided by auxiliary images of the same subject."""

from . import interrupts  # noqa: F401  # first, for Ctrl-C while the others are imported
from .config import MMMAEConfig
from .cost import profile
from .model.encoder import HSIEncoder, LinearClassifier
from .model.export import export_encoder
from .model.fast import FastModel, fast_model
from .model.finetuned import load_finetuned
from .model.heads import SegmentationModel
from .model.imports import import_encoder, import_spectralgpt
from .model.inputs import Output
from .model.reference import ReferenceModel, reference_model
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
    "import_encoder",
    "import_spectralgpt",
    "load_finetuned",
    "profile",
    "reference_model",
    "tune_cpu",
]

"""Data: cubes from files, paired folders of subjects, batches with missing modalities, and a generated phantom."""

from .cube import Cube, read_cube, select_bands
from .folder import PairedFolder
from .normalization import Normalization, robust_percentiles
from .phantom import Phantom
from .sample import Batch, Sample, collate

__all__ = [
    "Batch",
    "Cube",
    "Normalization",
    "PairedFolder",
    "Phantom",
    "Sample",
    "collate",
    "read_cube",
    "robust_percentiles",
    "select_bands",
]

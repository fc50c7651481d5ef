"""Data: files to samples to batches, with missing modalities; caches and shards; and a generated phantom."""

from .augment import augment
from .bands import resample_bands, select_bands
from .cache import CachedSubjects, write_cache
from .cube import Cube, read_cube
from .folder import PairedFolder
from .normalization import Normalization, robust_percentiles
from .phantom import Phantom
from .phantom_files import write_phantom
from .sample import Batch, Sample, collate
from .shards import ShardedSubjects, write_shards
from .tiles import Position, untile

__all__ = [
    "Batch",
    "CachedSubjects",
    "Cube",
    "Normalization",
    "PairedFolder",
    "Phantom",
    "Position",
    "Sample",
    "ShardedSubjects",
    "augment",
    "collate",
    "read_cube",
    "resample_bands",
    "robust_percentiles",
    "select_bands",
    "untile",
    "write_cache",
    "write_phantom",
    "write_shards",
]

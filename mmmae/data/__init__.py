"""Data sets of subjects: files, samples and batches with missing modalities; caches and shards."""

from .augment import augment
from .bands import resample_bands, select_bands
from .dicts import DictSubjects
from .folder import PairedFolder
from .normalization import Normalization, robust_percentiles
from .readers.cube import Cube, read_cube
from .sample import Batch, Sample, collate
from .store.cache import CachedSubjects, write_cache
from .store.shards import ShardedSubjects, write_shards
from .subjects import Subjects
from .tiles import Position, untile

__all__ = [
    "Batch",
    "CachedSubjects",
    "Cube",
    "DictSubjects",
    "Normalization",
    "PairedFolder",
    "Position",
    "Sample",
    "ShardedSubjects",
    "Subjects",
    "augment",
    "collate",
    "read_cube",
    "resample_bands",
    "robust_percentiles",
    "select_bands",
    "untile",
    "write_cache",
    "write_shards",
]

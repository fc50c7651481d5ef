"""Process settings that make training on the CPU faster."""

from __future__ import annotations

import ctypes
import os
import platform

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
LARGEST_INT = 2**31 - 1


def tune_cpu() -> bool:
    """Make the C library keep freed memory instead of returning it to the system.

    A training step allocates and frees the same large tensors over and over. By default, glibc gets each of them from
    the system and returns it, and the system clears and maps all of its pages again. With these settings, glibc reuses
    the memory that the previous step freed. In exchange, the process keeps its largest size, and memory that it has
    freed is not available to other processes. Existing tensors and GPU memory are not affected.

    Returns:
        Whether the settings were made: False if the C library is not glibc, or with MMMAE_TUNE_CPU=0.
    """
    if os.environ.get("MMMAE_TUNE_CPU") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, LARGEST_INT))

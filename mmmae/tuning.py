"""Settings of the process that make training on the CPU faster."""

from __future__ import annotations

import ctypes
import os
import platform

# Of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
LARGEST_INT = 2**31 - 1


def tune_cpu() -> bool:
    """Let the C library keep freed memory instead of handing it back to the system.

    A training step allocates and frees the same large tensors over and over. Left to itself, glibc takes each of them
    from the system and returns it, and every page of it is cleared and mapped anew. Told not to, it gives out what the
    step before freed. The cost: the process stays as large as it has been at its largest, and memory that it freed is
    there for nobody else. Tensors that exist already, and memory of GPUs, are not concerned.

    Returns:
        Whether the settings were made: not where the C library is not glibc, nor with MMMAE_TUNE_CPU=0.
    """
    if os.environ.get("MMMAE_TUNE_CPU") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, LARGEST_INT))

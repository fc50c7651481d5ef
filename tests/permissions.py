"""Permissions of files that hold for root too, as they do for the users of a shared machine."""

import contextlib
import ctypes

VERSION = 0x20080522  # of Linux's capability structures: words for effective, permitted and inheritable, twice
OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def obeyed():
    """Take root's right to read and write every file away from this thread during the block."""
    system = ctypes.CDLL(None, use_errno=True)
    header, rights = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()
    assert system.capget(header, rights) == 0
    effective = rights[0]
    rights[0] = effective & ~OVERRIDES
    assert system.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] = effective
        assert system.capset(header, rights) == 0

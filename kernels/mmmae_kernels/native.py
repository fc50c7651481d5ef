"""Loads the compiled CPU library, or tells why there is none."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch  # noqa: F401  # its libgomp must be in the process first: the library then shares torch's threads


def library() -> ModuleType | None:
    """The compiled module (its functions: `_native.pyi`), or None.

    Warns once a process if it is missing, unless MMMAE_NATIVE=0 asks for that.
    """
    if _library is None and os.environ.get("MMMAE_NATIVE") != "0":
        _warn(_reason)
    return _library


def unavailable_reason() -> str | None:
    """None if there is a compiled library, else one line that says why not."""
    return _reason


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("MMMAE_NATIVE") == "0":
        return None, "the native CPU library is switched off by MMMAE_NATIVE=0"
    try:
        return importlib.import_module("mmmae_kernels._native"), None
    except ModuleNotFoundError:
        return None, "the native CPU library was not built: reinstall with a C++ compiler (pip -v shows the build)"
    except ImportError as error:
        return None, f"the native CPU library does not load: {' '.join(str(error).split())}"


@functools.cache
def _warn(reason: str | None) -> None:
    warnings.warn(f"{reason}; PyTorch code does its work, slower", RuntimeWarning, stacklevel=3)


# At import, not at the first call: torch.compile, which asks for the reason, can't trace an import.
_library, _reason = _load()

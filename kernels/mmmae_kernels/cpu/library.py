"""Loader of the compiled CPU library, and helpers to pass tensors to it."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch  # loads libgomp first, so that the library shares its thread pool
from torch import Tensor

FLOAT32 = torch.float32  # for code that runs at every call: found faster than in torch
DTYPES = {FLOAT32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int16: 3, torch.uint8: 4}  # as in floats.h


def module() -> ModuleType | None:
    """Return the compiled module, documented in `_native.pyi`, or None.

    Warns once a process if it is missing, unless MMMAE_NATIVE=0 is set.
    """
    if _library is None and os.environ.get("MMMAE_NATIVE") != "0":
        _warn(_reason)
    return _library


def unavailable_reason() -> str | None:
    """Return None if the compiled library is loaded, else the reason in one line."""
    return _reason


def function(name: str) -> Callable[..., Any]:
    """Return a compiled function by name; without the library, a function that raises RuntimeError with the reason.

    Modules call it once, at import.
    """
    if _library is not None:
        compiled: Callable[..., Any] = getattr(_library, name)
        return compiled

    def missing(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError(f"the native library can't be used: {unavailable_reason()}")

    return missing


def float_vector(tensor: Tensor) -> Tensor:
    """Return a tensor `[D]`, or a copy that is contiguous and in float32."""
    is_ready = tensor.dtype is FLOAT32 and tensor.is_contiguous()
    return tensor if is_ready else tensor.to(FLOAT32).contiguous()


def contiguous_rows(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy with a contiguous last axis; expanded axes stay expanded."""
    if tensor.is_contiguous() or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    shape = tensor.shape
    tensor = tensor.detach()
    for axis in range(tensor.dim() - 1):
        if tensor.stride(axis) == 0 and shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor.contiguous().expand(shape)


def to_three_axes(tensor: Tensor) -> Tensor:
    """Return `contiguous_rows` of a tensor `[..., D]` reshaped to `[A, B, D]`, as a view if possible."""
    tensor = tensor.detach()
    if tensor.dim() > 3:
        tensor = tensor.flatten(0, -3)
    while tensor.dim() < 3:
        tensor = tensor.unsqueeze(0)
    return contiguous_rows(tensor)


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("MMMAE_NATIVE") == "0":
        return None, "the native CPU library is switched off by MMMAE_NATIVE=0"
    try:
        return importlib.import_module("mmmae_kernels._native"), None
    except ModuleNotFoundError:
        return None, "the native CPU library was not built; reinstall with a C++ compiler (pip -v shows the build)"
    except ImportError as error:
        return None, f"the native CPU library does not load: {' '.join(str(error).split())}"


@functools.cache
def _warn(reason: str | None) -> None:
    warnings.warn(f"{reason}; slower PyTorch code is used instead", RuntimeWarning, stacklevel=3)


# At import, not at the first call: torch.compile may trace the first call, and can't trace an import.
_library, _reason = _load()

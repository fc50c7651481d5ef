"""Loads the compiled CPU library, or tells why there is none."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import torch  # its libgomp must be in the process before the library, which then shares torch's threads
from torch import Tensor


def module() -> ModuleType | None:
    """The compiled module (its functions: `_native.pyi`), or None.

    Warns once a process if it is missing, unless MMMAE_NATIVE=0 asks for that.
    """
    if _library is None and os.environ.get("MMMAE_NATIVE") != "0":
        _warn(_reason)
    return _library


def unavailable_reason() -> str | None:
    """None if there is a compiled library, else one line that says why not."""
    return _reason


def call(function: str, *arguments: Any) -> Any:
    """What a compiled function of `_native.pyi` gives, on torch's threads.

    Raises:
        ValueError: a tensor lies elsewhere than on the CPU, or whatever else the function refuses.
        RuntimeError: there is no compiled library.
    """
    compiled = module()
    if compiled is None:
        raise RuntimeError(f"the native library can't be used: {unavailable_reason()}")
    return getattr(compiled, function)(*map(_capsule, arguments), torch.get_num_threads())


def _capsule(argument: Any) -> Any:
    """A tensor as a DLPack capsule: nanobind asks a tensor for one in Python, which takes ten times as long."""
    if not isinstance(argument, Tensor):
        return argument
    if not argument.is_cpu:
        raise ValueError(f"a tensor lies on {argument.device}, native kernels run on the CPU")
    return torch.to_dlpack(argument)  # type: ignore[attr-defined]


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """ValueError unless the tensor has this shape and dtype and lies on the CPU."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected is {list(shape)}")
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, expected is {dtype} on the CPU")


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor as compiled functions take it: detached, its last axis in one piece.

    Only what must be is copied: an axis that is expanded stays so.
    """
    tensor = tensor.detach()
    if tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    shape = tensor.shape
    for axis in range(tensor.dim() - 1):
        if tensor.stride(axis) == 0 and shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor.contiguous().expand(shape)


def in_three_axes(tensor: Tensor) -> Tensor:
    """`rows_of` of a tensor `[..., D]` as `[A, B, D]`, a view where there is one."""
    if tensor.dim() > 3:
        tensor = tensor.flatten(0, -3)
    while tensor.dim() < 3:
        tensor = tensor.unsqueeze(0)
    return rows_of(tensor)


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

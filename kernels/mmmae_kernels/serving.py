"""What native and Triton kernels ask of a machine and of a call's tensors, and where the kernels are."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import executors, native
from .registry import Reason

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Known at import: torch.compile asks, and can't trace what these take.
_has_triton = importlib.util.find_spec("triton") is not None
_interprets = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def triton_unavailable() -> Reason:
    """None if Triton kernels can run on this machine, else one line that says why not."""
    if not _has_triton:
        return "triton is not installed"
    if not (torch.cuda.is_available() or _interprets or executors.current() is not None):
        return "there is no GPU that torch can use"
    return None


def triton_refuses(tensors: Iterable[tuple[str, Tensor | None]]) -> Reason:
    """None if Triton kernels take these floating point tensors, else the reason why not."""
    unavailable = triton_unavailable()
    if unavailable is not None:
        return unavailable
    for name, tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not _interprets and executors.current() is None:
            return f"{name} lies on {tensor.device}, Triton kernels run on GPUs"
        if tensor.dtype not in TRITON_DTYPES:
            return f"{name} has dtype {tensor.dtype}, Triton kernels take float32, float16 and bfloat16"
    return None


native_unavailable = native.unavailable_reason


def native_refuses(tensors: Iterable[tuple[str, Tensor | None]]) -> Reason:
    """None if native kernels take these floating point tensors, else the reason why not."""
    unavailable = native_unavailable()
    if unavailable is not None:
        return unavailable
    for name, tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{name} lies on {tensor.device}, native kernels run on the CPU"
        if tensor.dtype != torch.float32:
            return f"{name} has dtype {tensor.dtype}, native kernels take float32"
    return None


def kernels(op: str, backend: str) -> Any:
    """The module with an op's kernels for `native` or `triton`, under the same names in both."""
    return importlib.import_module(f"mmmae_kernels.{op}.{'triton_kernel' if backend == 'triton' else 'native'}")

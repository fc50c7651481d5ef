"""GPU architectures: which one a device has, and whether Triton kernels support it."""

from __future__ import annotations

import functools

import torch

from . import executors
from .config import SHARED_MEMORY

COMPILED_FOR_AMD = tuple(target for target in SHARED_MEMORY if target.startswith("gfx"))


def target_of(device: torch.device) -> str:
    """Return the architecture that launches on `device` are compiled for, for example `sm80` or `gfx942`."""
    target = executors.current_target()
    if target is not None:
        return target
    if device.type != "cuda":
        return "sm80"  # for Triton's interpreter
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def refuses(target: str) -> str | None:
    """Return None if Triton kernels support an architecture, else what they need instead."""
    if target.startswith("sm") and int(target[2:]) < 80:
        # Products in bfloat16 and TF32 would run without matrix units, and Triton itself supports nothing older.
        return "Triton kernels need compute capability 8.0 or above"
    if target.startswith("gfx") and target not in COMPILED_FOR_AMD:
        return f"Triton kernels are compiled for {', '.join(COMPILED_FOR_AMD)}"
    return None


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{10 * major + minor}"

"""Starts Triton kernels: the one place that every launch passes, so that it can be timed, recorded or executed elsewhere."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

# Shared memory a block may have, bytes. NVIDIA: CUDA C++ Programming Guide, technical specifications by compute
# capability; AMD: LDS of a workgroup, in each architecture's ISA guide.
SHARED_MEMORY = {
    "sm80": 163 << 10,
    "sm86": 99 << 10,
    "sm89": 99 << 10,
    "sm90": 227 << 10,
    "sm100": 227 << 10,
    "sm120": 99 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
    "gfx1100": 64 << 10,
}

# Which row of a launch table an architecture reads: they differ in shared memory, in the matrix instruction and in the
# threads of a warp.
FAMILIES = {
    "sm80": "ampere",
    "sm86": "small",
    "sm89": "small",
    "sm120": "small",
    "sm90": "hopper",
    "sm100": "hopper",
    "gfx90a": "cdna",
    "gfx942": "cdna",
    "gfx1100": "rdna",
}


class Config(NamedTuple):
    """How a kernel is compiled: its block sizes and other constants, warps a program, stages of its pipelined loop."""

    constants: Mapping[str, int]
    warps: int = 4
    stages: int = 1


class Launch(NamedTuple):
    """One launch: the kernel, its grid as a function of the constants, and its arguments by name."""

    kernel: Any
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]]
    arguments: Mapping[str, Any]
    config: Config


class Executor(Protocol):
    """Takes launches in place of the GPU: a recorder, or an emulator of `target`."""

    target: str

    def __call__(self, launch: Launch) -> None: ...


_executors: list[Executor] = []


@contextlib.contextmanager
def execute_by(executor: Executor) -> Iterator[None]:
    """Hand every launch in the block to `executor`; tensors may then lie anywhere."""
    _executors.append(executor)
    try:
        yield
    finally:
        _executors.pop()


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]],
    arguments: Mapping[str, Any],
    configs: tuple[Config, ...],
) -> None:
    """Start `kernel` on the device of its tensors, by the first of `configs`, or the fastest if MMMAE_AUTOTUNE=1.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs along each axis, given the config's constants. No program, no launch.
        arguments: all that the config does not name, by name.
        configs: the launch table's row, the best guess first.
    """
    if _executors:
        if 0 not in grid(configs[0].constants):
            _executors[-1](Launch(kernel, grid, arguments, configs[0]))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if 0 in grid(configs[0].constants):
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        config = configs[0]
        kernel[grid](**arguments, **config.constants, num_warps=config.warps, num_stages=config.stages)


def strides(name: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """A tensor's strides as arguments `stride_{name}_{axis}`, one for each letter of `axes`; 0 for no tensor."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"stride_{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def target_of(device: torch.device) -> str:
    """The architecture that a launch on `device` is compiled for, `sm80` or `gfx942` for instance."""
    if _executors:
        return _executors[-1].target
    return _architecture(device.index or 0) if device.type == "cuda" else "sm80"


def family_of(device: torch.device) -> str:
    """The row of a launch table for `device`; an unknown architecture reads the one that asks least."""
    target = target_of(device)
    return FAMILIES.get(target, "cdna" if target.startswith("gfx9") else "rdna" if target.startswith("gfx") else "small")


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{10 * major + minor}"

"""Starts Triton kernels: every launch passes here, so that it can be timed, recorded or executed elsewhere."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import autotune, executors

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
    """How a kernel is compiled: its block sizes and other constants, warps a program, stages of its pipelined loop.

    `registers` is what a thread may have on an NVIDIA GPU. Left to itself, the assembler spills a few into memory where
    that lets another block run beside.
    """

    constants: Mapping[str, int]
    warps: int = 4
    stages: int = 1
    registers: int | None = None

    def options(self, target: str) -> dict[str, int]:
        """What Triton's compiler takes for `target`."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None and target.startswith("sm"):
            options["maxnreg"] = self.registers
        return options


Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]


class Launch(NamedTuple):
    """One launch: the kernel, its grid as a function of the constants, its arguments by name, and its table's row."""

    kernel: Any
    grid: Grid
    arguments: Mapping[str, Any]
    configs: tuple[Config, ...]


def launch(kernel: Any, grid: Grid, arguments: Mapping[str, Any], configs: tuple[Config, ...]) -> Config:
    """Start `kernel` on the device of its tensors, by the first of `configs`, or the fastest if MMMAE_AUTOTUNE=1.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs along each axis, given the config's constants. No program, no launch.
        arguments: all that the config does not name, by name.
        configs: the launch table's row, the best guess first.

    Returns:
        The config that was launched.
    """
    config = configs[0]
    if 0 in grid(config.constants):
        return config
    executor = executors.current()
    if executor is not None:
        return executor(Launch(kernel, grid, arguments, configs))
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if len(configs) > 1 and autotune.is_on():
            config = autotune.fastest(Launch(kernel, grid, arguments, configs), target_of(device), _start)
        _start(kernel, grid, arguments, config)
    return config


def _start(kernel: Any, grid: Grid, arguments: Mapping[str, Any], config: Config) -> None:
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    options = config.options(target_of(device)) if device.type == "cuda" else {}  # the interpreter has none
    kernel[grid](**arguments, **config.constants, **options)


def row_config(width: int, device: torch.device) -> Config:
    """For kernels that hold a row in one program: 8 channels a thread, 16 bytes of a half type, up to 512 threads."""
    block = int(triton.next_power_of_2(max(width, 1)))
    return element_config({"BLOCK_D": block}, block, device)


def element_config(constants: Mapping[str, int], elements: int, device: torch.device) -> Config:
    """As many warps as give each thread 8 of a program's elements."""
    threads = 64 if family_of(device) == "cdna" else 32
    return Config(constants, warps=max(1, min(1024 // threads // 2, elements // (8 * threads))))


def strides(name: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """A tensor's strides as arguments `stride_{name}_{axis}`, one for each letter of `axes`; 0 for no tensor."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"stride_{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def target_of(device: torch.device) -> str:
    """The architecture that a launch on `device` is compiled for, `sm80` or `gfx942` for instance."""
    executor = executors.current()
    if executor is not None:
        return executor.target
    if device.type != "cuda":
        return "sm80"  # for Triton's interpreter
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def family_of(device: torch.device) -> str:
    """The row of a launch table for `device`; an unknown architecture reads the one that asks least."""
    target = target_of(device)
    if target in FAMILIES:
        return FAMILIES[target]
    return "cdna" if target.startswith("gfx9") else "rdna" if target.startswith("gfx") else "small"


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{10 * major + minor}"

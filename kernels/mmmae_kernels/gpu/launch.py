"""Starts Triton kernels: every launch passes here, so that it can be planned, timed, recorded or executed elsewhere."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import autotune, executors
from .executors import StandInGpu
from .plans import Plan, is_hooked, key_and_pointers, make_plan

MOST_PLANS = 4096  # where sizes never repeat, plans start over at this many

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
    """One launch: the kernel, its grid as a function of the constants, its arguments by name, and its table's row.

    The configs stand with the best guess first.
    """

    kernel: Any
    grid: Grid
    arguments: Mapping[str, Any]
    configs: tuple[Config, ...]


Plans: TypeAlias = "dict[tuple[Hashable, ...], Plan]"
_plans: Plans = {}

# Given the architecture and the numbers of a launch, all of it but its tensors, which `launch` adds by their names.
Describe: TypeAlias = Callable[..., Launch]


def launch(describe: Describe, tensors: tuple[Tensor | None, ...], numbers: tuple[Hashable, ...]) -> Config:
    """Start the kernel that `describe` names on the device of its tensors.

    A GPU starts it by a plan, which is made the first time that a launch differs in its numbers or in what Triton
    compiles a kernel for: types, which tensors there are, and their alignment. Only then is `describe` called.

    Args:
        describe: a function, not a closure: it is a part of what plans are found by. It takes the architecture and
            `numbers`, and may depend on nothing else.
        tensors: the kernel's first parameters, in its order; the first of them is no None.
        numbers: sizes, strides, types and whatever else the launch depends on.

    Returns:
        The config that was launched: the first of its table's row, or the fastest if MMMAE_AUTOTUNE=1. No program, no
        launch.
    """
    executor = executors.current()
    if executor is None:
        return start(_plans, describe, tensors, numbers)
    if isinstance(executor, StandInGpu):
        return start(executor.plans, describe, tensors, numbers)
    described = describe_launch(executor.target, describe, tensors, numbers)
    if 0 in described.grid(described.configs[0].constants):
        return described.configs[0]
    return executor(described)


def start(
    plans: Plans, describe: Describe, tensors: tuple[Tensor | None, ...], numbers: tuple[Hashable, ...]
) -> Config:
    """Start a launch by the plan that there is for it, or through Triton, to keep its plan."""
    key, pointers = key_and_pointers(describe, tensors, numbers)
    plan = plans.get(key)
    if plan is None or is_hooked():
        return _start_by_triton(plans, key, describe, tensors, numbers)
    config, _, device, current_device, current_stream, (function, before, after, packed), values = plan
    if current_device() != device:
        with torch.cuda.device(device):
            return start(plans, describe, tensors, numbers)
    if packed:
        function(*before, current_stream(device), *after, (*pointers, *values))
    else:
        function(*before, current_stream(device), *after, *pointers, *values)
    return config


def _start_by_triton(
    plans: Plans,
    key: tuple[Hashable, ...],
    describe: Describe,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Hashable, ...],
) -> Config:
    device = next(tensor.device for tensor in tensors if tensor is not None)
    target = target_of(device)
    described = describe_launch(target, describe, tensors, numbers)
    config = described.configs[0]
    if 0 in described.grid(config.constants):
        return config
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if len(described.configs) > 1 and autotune.is_on():
            config = autotune.fastest(described, target, functools.partial(_start, target))
        plan = make_plan(_start(target, described, config), described, config, len(tensors))
    if plan is not None:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plans[key] = plan
    return config


def _start(target: str, launch: Launch, config: Config) -> Any:
    options = config.options(target) if isinstance(launch.kernel, JITFunction) else {}  # the interpreter has none
    return launch.kernel[launch.grid](**launch.arguments, **config.constants, **options)


def describe_launch(
    target: str, describe: Describe, tensors: tuple[Tensor | None, ...], numbers: tuple[Hashable, ...]
) -> Launch:
    """The whole of a launch, tensors included."""
    described = describe(target, *numbers)
    named = dict(zip(described.kernel.arg_names, tensors, strict=False))
    return described._replace(arguments={**named, **described.arguments})


def row_config(width: int, target: str) -> Config:
    """For kernels that hold a row in one program: 8 channels a thread, 16 bytes of a half type, up to 512 threads."""
    block = next_power_of_2(width)
    return element_config({"BLOCK_D": block}, block, target)


def element_config(constants: Mapping[str, int], elements: int, target: str) -> Config:
    """As many warps as give each thread 8 of a program's elements."""
    threads = 64 if family_of(target) == "cdna" else 32
    return Config(constants, warps=max(1, min(1024 // threads // 2, elements // (8 * threads))))


def strides(name: str, axes: str, values: tuple[int, ...] | None) -> dict[str, int]:
    """Strides as arguments `stride_{name}_{axis}`, one for each letter of `axes`; 0 for those of no tensor."""
    values = (0,) * len(axes) if values is None else values
    return {f"stride_{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number`, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def target_of(device: torch.device) -> str:
    """The architecture that a launch on `device` is compiled for, `sm80` or `gfx942` for instance."""
    executor = executors.current()
    if executor is not None:
        return executor.target
    if device.type != "cuda":
        return "sm80"  # for Triton's interpreter
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def family_of(target: str) -> str:
    """The row of a launch table for an architecture; one that is unknown reads the row that asks least."""
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

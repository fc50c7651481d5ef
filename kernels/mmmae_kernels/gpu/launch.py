"""Starts Triton kernels: every launch passes here, so that it can be planned, timed, recorded or executed elsewhere."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import autotune, executors
from .config import Config, Describe, Launch
from .executors import StandInGpu
from .plans import Plan, is_hooked, key_and_pointers, make_plan

MOST_PLANS = 4096  # where sizes never repeat, plans start over at this many

Plans: TypeAlias = "dict[tuple[Hashable, ...], Plan]"
_plans: Plans = {}


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


def target_of(device: torch.device) -> str:
    """The architecture that a launch on `device` is compiled for, `sm80` or `gfx942` for instance."""
    executor = executors.current()
    if executor is not None:
        return executor.target
    if device.type != "cuda":
        return "sm80"  # for Triton's interpreter
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{10 * major + minor}"

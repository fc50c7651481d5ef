"""Launching of Triton kernels; all launches go through here, to be planned, autotuned, recorded or emulated."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import autotune, executors
from .architecture import target_of
from .config import Config, Describe, Launch
from .executors import StandInGpu
from .plans import Plan, is_hooked, key_and_pointers, make_plan

MOST_PLANS = 4096  # at this number all plans are discarded, in case sizes never repeat

Plans: TypeAlias = "dict[tuple[Hashable, ...], Plan]"
_plans: Plans = {}


def launch(describe: Describe, tensors: tuple[Tensor | None, ...], numbers: tuple[Hashable, ...]) -> Config:
    """Launch a kernel on the device of its tensors.

    On a GPU a launch is started by a plan. `describe` is called to make the plan when a launch is the first with its
    numbers and with what Triton specialises a kernel to: dtypes, alignment, and which tensors are None. Nothing is
    launched for an empty grid.

    Args:
        describe: returns the `Launch`, given the architecture and `numbers`, and depends on nothing else. A module
            function, not a closure, because it is part of the key of a plan.
        tensors: the first arguments of the kernel, in order; the first one is not None.
        numbers: sizes, strides, dtypes and everything else that the launch depends on.

    Returns:
        The config that was used: the first one, or the fastest one with MMMAE_AUTOTUNE=1 once it is known.
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
    """Start a launch by its plan; without one, start it through Triton and make the plan."""
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
    decided = True
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if len(described.configs) > 1 and autotune.is_on():
            fastest = autotune.fastest(described, target, functools.partial(_start, target))
            config, decided = fastest or config, fastest is not None
        plan = make_plan(_start(target, described, config), described, config, len(tensors))
    if plan is not None and decided:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plans[key] = plan
    return config


def _start(target: str, launch: Launch, config: Config) -> Any:
    options = config.options(target) if isinstance(launch.kernel, JITFunction) else {}  # the interpreter takes none
    return launch.kernel[launch.grid](**launch.arguments, **config.constants, **options)


def describe_launch(
    target: str, describe: Describe, tensors: tuple[Tensor | None, ...], numbers: tuple[Hashable, ...]
) -> Launch:
    """Return the description of a launch with its tensors."""
    described = describe(target, *numbers)
    named = dict(zip(described.kernel.arg_names, tensors, strict=False))
    return described._replace(arguments={**named, **described.arguments})

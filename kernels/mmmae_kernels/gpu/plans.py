"""Launches that are worked out once: a later one takes its addresses and calls the launcher of the compiled kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

if TYPE_CHECKING:
    from .config import Config, Launch

HIP = torch.version.hip is not None

_runtime = triton.knobs.runtime


class Plan(NamedTuple):
    """A compiled kernel, loaded on a device, and all that it is started with but the addresses of its tensors."""

    config: Config
    compiled: Any
    device: int
    current_device: Callable[[], int]
    current_stream: Callable[[int], int]
    start: Start
    values: tuple[Any, ...]  # of the parameters after the tensors


class Start(NamedTuple):
    """How a compiled kernel is started: by a function that takes `before`, a stream, `after`, and the parameters."""

    function: Callable[..., None]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    packed: bool = False  # the parameters are one argument


def key_and_pointers(
    describe: Hashable, tensors: tuple[Tensor | None, ...], numbers: tuple[Hashable, ...]
) -> tuple[tuple[Hashable, ...], list[int]]:
    """Return what the plan of a launch is found by, all that it depends on but addresses, and the addresses.

    One loop over the tensors, because it runs at every launch.
    """
    first = tensors[0]
    assert first is not None
    key, pointers, bits = [describe, numbers, first.get_device()], list[int](), 0
    for tensor in tensors:
        if tensor is None:
            key.append(None)
            pointers.append(0)
        else:
            pointer = tensor.data_ptr()
            bits |= pointer
            key.append(tensor.dtype)
            pointers.append(pointer)
    if bits & 15:
        key.extend([pointer & 15 == 0 for pointer in pointers])
    if HIP:  # Triton computes offsets in 32 bits into storage that they reach all of
        key.extend([tensor is None or tensor.untyped_storage().nbytes() < 2**31 for tensor in tensors])
    return tuple(key), pointers


def make_plan(compiled: Any, launch: Launch, config: Config, tensors: int) -> Plan | None:
    """The plan of a launch that Triton has just made on the current device.

    Args:
        compiled: what Triton gave for it.
        tensors: how many of the kernel's parameters are tensors, the first ones.

    Returns:
        None where there is no compiled kernel to start: in Triton's interpreter for instance.
    """
    if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
        return None
    active = driver.active
    current_device = active.get_current_device
    if current_device is torch.cuda.current_device:
        # The same, without asking whether CUDA is initialised.
        current_device = getattr(torch._C, "_cuda_getDevice", current_device)
    values = {**launch.arguments, **config.constants}
    rest = tuple(values[name] for name in launch.kernel.arg_names[tensors:])
    grid = (*launch.grid(config.constants), 1, 1)[:3]
    start = Start(compiled.run, grid, (compiled.function, compiled.packed_metadata, None, None, None))
    return Plan(
        config=config,
        compiled=compiled,
        device=current_device(),
        current_device=current_device,
        current_stream=active.get_current_stream,
        start=shortened(start, tensors + len(rest)),
        values=rest,
    )


def shortened(start: Start, parameters: int) -> Start:
    """Leave out the Python in front of a launcher's C function, which is half of what starting a kernel costs.

    It asks for memory that kernels may want for scratch, which ours do not, and hands on what it was given with what
    the launcher holds. What that comes to is seen by a copy of the launcher that calls something else.
    """
    launcher: Any = start.function
    if any(getattr(launcher, name, None) != 0 for name in ("global_scratch_size", "profile_scratch_size")):
        return start
    probe, seen = copy.copy(launcher), list[tuple[Any, ...]]()
    if not hasattr(probe, "launch"):
        return start
    probe.launch = lambda *arguments: seen.append(arguments)
    stream, marks = object(), tuple(object() for _ in range(parameters))
    probe(*start.before, stream, *start.after, *marks)
    for packed, end in ((True, (marks,)), (False, marks)):
        if len(seen) == 1 and stream in seen[0] and seen[0][-len(end) :] == end:
            place = seen[0].index(stream)
            return Start(launcher.launch, seen[0][:place], seen[0][place + 1 : -len(end)], packed)
    return start


def is_hooked() -> bool:
    """Whether somebody listens to launches, as Triton's profiler does: then they go Triton's own way."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(enter and getattr(enter, "calls", True)) or bool(leave and getattr(leave, "calls", True))

"""Plans of launches: made once, then a launch only fills in addresses and calls the compiled kernel's launcher."""

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
    """A compiled kernel loaded on a device, with all its launch arguments except the addresses of tensors."""

    config: Config
    compiled: Any
    device: int
    current_device: Callable[[], int]
    current_stream: Callable[[int], int]
    start: Start
    values: tuple[Any, ...]  # arguments after the tensors


class Start(NamedTuple):
    """A launcher: `function(*before, stream, *after, *parameters)`."""

    function: Callable[..., None]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    packed: bool = False  # whether the parameters are passed as one tuple


def key_and_pointers(
    describe: Hashable, tensors: tuple[Tensor | None, ...], numbers: tuple[Hashable, ...]
) -> tuple[tuple[Hashable, ...], list[int]]:
    """Return the key of a launch's plan, which is all that the plan depends on, and the addresses of its tensors.

    This runs at every launch, hence in a single loop over the tensors.
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
    if HIP:  # Triton uses 32-bit offsets for storage smaller than 2 GiB
        key.extend([tensor is None or tensor.untyped_storage().nbytes() < 2**31 for tensor in tensors])
    return tuple(key), pointers


def make_plan(compiled: Any, launch: Launch, config: Config, tensors: int) -> Plan | None:
    """Return the plan of a launch that Triton has just started on the current device.

    Args:
        compiled: the compiled kernel that Triton returned.
        tensors: number of tensor parameters, which come first.

    Returns:
        The plan, or None if there is no compiled kernel, as in Triton's interpreter.
    """
    if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
        return None
    active = driver.active
    current_device = active.get_current_device
    if current_device is torch.cuda.current_device:
        # Returns the same without checking whether CUDA is initialised.
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
    """Return a start that calls a launcher's C function directly, which halves the host time of a launch.

    The Python code in front of it allocates scratch memory, which our kernels do not use, and passes on its arguments
    together with attributes of the launcher. A copy of the launcher with a recording function shows which.
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
            index = seen[0].index(stream)
            return Start(launcher.launch, seen[0][:index], seen[0][index + 1 : -len(end)], packed)
    return start


def is_hooked() -> bool:
    """Return whether launch hooks are set, as by Triton's profiler; launches then have to go through Triton."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(enter and getattr(enter, "calls", True)) or bool(leave and getattr(leave, "calls", True))

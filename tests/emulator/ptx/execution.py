"""Compile a Triton kernel for an NVIDIA GPU and execute it on the CPU, on the memory of its tensor arguments."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tests.emulator.ptx.compilation import Compiled, compile_kernel, parameter_bits
from tests.emulator.ptx.errors import UnsupportedKernel
from tests.emulator.ptx.executor import Executor
from tests.emulator.ptx.global_memory import GlobalMemory, Segment
from tests.emulator.ptx.ordering import Order, OrderedMemory, has_order
from tests.emulator.ptx.program import Program, parse

# Threads of all blocks that run together: numpy's time for one instruction hardly grows up to here, as long as the
# registers, which are as many as the compiler has values, do not take more than the processor's caches.
_THREADS_TOGETHER = 2048
_REGISTER_BYTES = 1 << 25


@dataclass(frozen=True)
class Statistics:
    """What an execution took.

    Args:
        instructions: how many were executed, one for all threads of the blocks that ran together.
        blocks: how many blocks ran.
        shared_bytes: shared memory of a block.
        seconds_compile: time of Triton's compiler and of parsing and binding the PTX, which are cached.
        seconds_run: time of the execution itself.
    """

    instructions: int
    blocks: int
    shared_bytes: int
    seconds_compile: float
    seconds_run: float


def execute(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Any],
    *,
    target: str = "sm80",
    num_warps: int = 4,
    num_stages: int = 3,
    mutate: Callable[[str], str] | None = None,
    blocks: Iterable[Sequence[int]] | None = None,
    bounds: str = "storage",
) -> Statistics:
    """Execute `kernel[grid](**arguments)` as compiled for `target`, in place on its tensors.

    Args:
        kernel: a `@triton.jit` function, not interpreted.
        grid: up to three numbers of blocks.
        arguments: by name, all parameters that have no default: CPU tensors of any strides, numbers, None, constexprs.
        target: "sm80", "sm86", "sm89", "sm90" or "sm120".
        mutate: a function that changes the PTX before it runs, to show that a test detects a wrong program.
        blocks: numbers (x, y, z) of the blocks to run, where missing numbers are 0; None means the whole grid.
        bounds: the memory that the kernel may access: "storage", all of each tensor's storage, or "view", from its
            first element to its last.

    Raises:
        EmulatorError: the kernel is wrong in one of the ways that `errors` lists, or it can't run here.
        ValueError: `mutate` changes nothing, or a block lies outside the grid.
    """
    begin = time.perf_counter()
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled, bound = compile_kernel(kernel, arguments, target, options)
    ptx = compiled.ptx if mutate is None else mutate(compiled.ptx)
    if mutate is not None and ptx == compiled.ptx:
        raise ValueError("mutate does not change the PTX")
    whole_grid = _three(grid, 1)
    chosen = _chosen(whole_grid, blocks)
    parts = _together(chosen, compiled.threads, _parsed(ptx).register_bytes)
    executors = [_executor(ptx, compiled.threads, len(part), compiled.shared_bytes) for part in parts]
    compiled_at = time.perf_counter()
    segments = _segments(bound, compiled, bounds)
    order = Order(whole_grid) if has_order(_parsed(ptx)) else None
    count = 0
    for part, executor in zip(parts, executors, strict=True):
        state = executor.state
        _set_parameters(state.parameters, bound, compiled)
        readable = [*segments, *state.constants]
        memory = OrderedMemory(readable, state, order, part) if order else GlobalMemory(readable, state.faults)
        with np.errstate(all="ignore"), state.started(part, whole_grid, memory):
            count += executor.run()
    done = time.perf_counter()
    return Statistics(count, len(chosen), compiled.shared_bytes, compiled_at - begin, done - compiled_at)


@lru_cache(maxsize=64)
def _parsed(ptx: str) -> Program:
    return parse(ptx)


@lru_cache(maxsize=8)
def _executor(ptx: str, threads: int, block_count: int, shared_bytes: int) -> Executor:
    return Executor(_parsed(ptx), threads, block_count, shared_bytes)


def _three(numbers: Sequence[int], rest: int) -> tuple[int, int, int]:
    if not 1 <= len(numbers) <= 3:
        raise ValueError(f"got {tuple(numbers)}, expected one to three numbers")
    x, y, z = [*map(int, numbers), rest, rest][:3]
    return x, y, z


def _chosen(grid: tuple[int, int, int], blocks: Iterable[Sequence[int]] | None) -> list[tuple[int, int, int]]:
    if blocks is None:
        return [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(grid)))]
    chosen = [_three(block, 0) for block in blocks]
    outside = [block for block in chosen if not all(0 <= i < n for i, n in zip(block, grid, strict=True))]
    if outside:
        raise ValueError(f"block {outside[0]} lies outside the grid {grid}")
    return chosen


def _together(
    blocks: list[tuple[int, int, int]], threads: int, register_bytes: int
) -> list[list[tuple[int, int, int]]]:
    """Split the blocks, in order, into as few parts as possible, all but the last of the same length."""
    most = max(min(_THREADS_TOGETHER, _REGISTER_BYTES // max(register_bytes, 1)) // threads, 1)
    parts = -(-len(blocks) // most)
    size = -(-len(blocks) // parts) if parts else 1
    return [blocks[at : at + size] for at in range(0, len(blocks), size)]


def _segments(arguments: Mapping[str, Any], compiled: Compiled, bounds: str) -> list[Segment]:
    """Return the memory of the tensor arguments as segments that do not overlap."""
    if bounds not in ("storage", "view"):
        raise ValueError(f"bounds is {bounds!r}, must be 'storage' or 'view'")
    extents = []
    for name, triton_type in compiled.signature.items():
        tensor = arguments[name]
        if not triton_type.startswith("*"):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedKernel(f"{name} is a {type(tensor).__name__}, expected a tensor")
        start, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if bounds == "view":
            last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start, size = tensor.data_ptr(), (last + 1) * tensor.element_size() if tensor.numel() else 0
        if size:
            extents.append((start, start + size, name, tensor))
    merged: list[tuple[int, int, str, tuple[torch.Tensor, ...]]] = []
    for start, end, name, tensor in sorted(extents, key=lambda extent: extent[:2]):
        if merged and start < merged[-1][1]:
            first, last_end, names, tensors = merged.pop()
            merged.append((first, max(end, last_end), f"{names} and {name}", (*tensors, tensor)))
        else:
            merged.append((start, end, name, (tensor,)))
    return [Segment(name, start, end - start, tensors) for start, end, name, tensors in merged]


def _set_parameters(parameters: Mapping[str, Any], arguments: Mapping[str, Any], compiled: Compiled) -> None:
    """Set the PTX's parameters: the arguments that are not constexpr, then null pointers for scratch memory."""
    passed = [(arguments[name], kind) for name, kind in compiled.signature.items() if kind != "constexpr"]
    for number, value in enumerate(parameters.values()):
        bits = parameter_bits(*passed[number]) if number < len(passed) else 0
        value[0] = bits & (1 << 8 * value.itemsize) - 1

"""Measures of this machine: the speed of copies and of matrix products alone, and the memory that a run takes."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from bench.device_time import copies_for, is_queued, queued

Shape = tuple[int, int, int, int]  # batch, rows, inner, columns
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}  # position of the first factor
ROUNDS = 5
# Sizes at which a copy and a square product run at their full speed: more than all caches hold, all cores at work.
COLD_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
SQUARE = {"cpu": 2048, "cuda": 8192}


def median_seconds(runs: Sequence[Callable[[], object]], device: str = "cpu", rounds: int = ROUNDS) -> float:
    """Return the median time of a few rounds, which take `runs` in turn, after one of each to warm up."""
    if is_queued(device):
        return statistics.median(queued(runs, rounds))
    for run in runs:
        run()
    seconds = []
    for number in range(rounds):
        start = time.perf_counter()
        runs[number % len(runs)]()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def copy_speed(device: str) -> float:
    """Return the bytes a second that a copy of cold memory reads and writes together."""
    source = torch.ones(COLD_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COLD_BYTES[device] / median_seconds([lambda: target.copy_(source)], device)


def gemm_speed(device: str, dtype: str) -> float:
    """Return the operations a second of a square matrix product, two a multiply-add."""
    size = SQUARE[device]
    return 2 * size**3 / seconds_alone({(1, size, size, size): 1}, device, dtype)


def gemms_of(run: Callable[[], object]) -> Counter[Shape]:
    """Return the shapes of a run's matrix products, and how many there are of each."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    shapes: Counter[Shape] = Counter()
    for event in profiler.events():
        if event.name in PRODUCTS:
            first = PRODUCTS[event.name]
            left, right = event.input_shapes[first : first + 2]
            shapes[(math.prod(left[:-2]), *left[-2:], right[-1])] += 1
    return shapes


def macs_of(shapes: Mapping[Shape, int]) -> int:
    """Return the multiply-adds of matrix products of these shapes."""
    return sum(times * math.prod(shape) for shape, times in shapes.items())


def seconds_alone(shapes: Mapping[Shape, int], device: str, dtype: str) -> float:
    """Return the seconds that products of these shapes take one after another, by the faster of torch's libraries."""
    return sum(times * _seconds_of_product(shape, device, dtype) for shape, times in shapes.items())


def _seconds_of_product(shape: Shape, device: str, dtype: str) -> float:
    batch, rows, inner, columns = shape
    element = getattr(torch, dtype)
    moved = element.itemsize * batch * (rows * inner + inner * columns + rows * columns)

    def product() -> Callable[[], object]:
        left = torch.randn(batch, rows, inner, device=device).to(element)
        right = torch.randn(batch, inner, columns, device=device).to(element)
        out = torch.empty(batch, rows, columns, device=device, dtype=element)
        if batch > 1:
            return lambda: torch.bmm(left, right, out=out)
        return lambda: torch.mm(left[0], right[0], out=out[0])

    seconds = median_seconds([product() for _ in range(copies_for(moved) if is_queued(device) else 1)], device)
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if batch == 1 and device == "cpu" and dtype == "float32" and has_onednn:
        left, transposed = torch.randn(rows, inner), torch.randn(columns, inner)
        by_onednn = torch.ops.mkldnn._linear_pointwise
        seconds = min(seconds, median_seconds([lambda: by_onednn(left, transposed, None, "none", [], "")]))
    return seconds


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Return the most bytes that torch's allocator gave out at once in a run, beyond those it held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

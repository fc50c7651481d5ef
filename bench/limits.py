"""Measures of this machine: the speed of copies and of matrix products alone, and the memory that a run takes."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

Shape = tuple[int, int, int, int]  # batch, rows, inner, columns
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}  # position of the first factor
ROUNDS = 5
COLD_BYTES = 256 * 2**20  # more than a core's caches hold


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], object], device: str = "cpu", rounds: int = ROUNDS) -> float:
    """Return the median time of a few runs, after one to warm up."""
    seconds = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def copy_speed(device: str) -> float:
    """Return the bytes a second that a copy of cold memory reads and writes together."""
    source = torch.ones(COLD_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COLD_BYTES / median_seconds(lambda: target.copy_(source), device)


def gemm_speed(device: str, dtype: str, size: int = 2048) -> float:
    """Return the operations a second of a square matrix product, two a multiply-add."""
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
    left = torch.randn(batch, rows, inner, device=device).to(element)
    right = torch.randn(batch, inner, columns, device=device).to(element)
    out = torch.empty(batch, rows, columns, device=device, dtype=element)
    if batch > 1:
        return median_seconds(lambda: torch.bmm(left, right, out=out), device)
    seconds = median_seconds(lambda: torch.mm(left[0], right[0], out=out[0]), device)
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if device == "cpu" and dtype == "float32" and has_onednn:
        transposed = right[0].t().contiguous()
        by_onednn = torch.ops.mkldnn._linear_pointwise
        seconds = min(seconds, median_seconds(lambda: by_onednn(left[0], transposed, None, "none", [], ""), device))
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

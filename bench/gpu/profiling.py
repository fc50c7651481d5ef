"""Which kernels a GPU runs, how long each, and how much of it is matrix products."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PRODUCTS = re.compile(r"gemm|cutlass|xmma|nvjet|cublas|splitK|Cijk|hgemm|sgemm", re.IGNORECASE)
# Names of attention's kernels hold those of products too.
ATTENTION = re.compile(r"flash|fmha|attention|sdpa|softmax", re.IGNORECASE)
TOP = 20
KIND = DeviceType.CUDA  # of the device whose time counts; a dry run takes the CPU's
Row = dict[str, Any]


def kernels_of(run: Callable[[], object], steps: int = 1) -> list[Row]:
    """Return kernel, seconds and launches of a run, for each kernel, the longest first."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    rows = [
        {"kernel": event.key, "seconds": _seconds(event) / steps, "launches": event.count / steps}
        for event in profiler.key_averages()
        if event.device_type == KIND and _seconds(event) > 0
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def _seconds(event: Any) -> float:
    """Return the seconds of an event, without those of the events in it."""
    own = event.self_device_time_total if KIND == DeviceType.CUDA else event.self_cpu_time_total
    return float(own) / 1e6


def summed(rows: Iterable[Mapping[str, Any]]) -> Row:
    """Return the seconds and launches of all kernels, and the shares of products and of attention."""
    rows = list(rows)
    seconds = sum(row["seconds"] for row in rows)
    attention = sum(row["seconds"] for row in rows if ATTENTION.search(row["kernel"]))
    products = sum(row["seconds"] for row in rows if kind_of(row["kernel"]) == "product")
    return {
        "seconds": seconds,
        "launches": sum(row["launches"] for row in rows),
        "products": products / seconds if seconds else 0.0,
        "attention": attention / seconds if seconds else 0.0,
    }


def kind_of(kernel: str) -> str:
    """Return whether a kernel is attention, a product, or something else, by its name."""
    if ATTENTION.search(kernel):
        return "attention"
    return "product" if PRODUCTS.search(kernel) else "other"

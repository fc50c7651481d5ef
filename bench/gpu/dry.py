"""Let the CPU pass for a GPU: streams, graphs and events are played, and events read a clock that goes by itself."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch._C._autograd import DeviceType

from bench import device_time, limits
from mmmae.training import step
from tests.emulator import graph

from . import profiling

TICK = 0.25  # milliseconds between two events


class Event:
    """Stands for `torch.cuda.Event`."""

    readings = itertools.count()

    def __init__(self, enable_timing: bool = False) -> None:
        self.reading = 0

    def record(self) -> None:
        """Read the clock."""
        self.reading = next(self.readings)

    def elapsed_time(self, other: Event) -> float:
        """Return the milliseconds from this event to another."""
        return TICK * (other.reading - self.reading)


class Patch(Protocol):
    """Replaces attributes, as pytest's `monkeypatch` does."""

    def setattr(self, target: Any, name: str, value: Any) -> None: ...


class ForGood:
    """Replaces attributes for the rest of the process."""

    def setattr(self, target: Any, name: str, value: Any) -> None:
        """Replace an attribute."""
        setattr(target, name, value)


def pretend(patch: Patch) -> None:
    """Make this process measure on the CPU as on a GPU, at small sizes."""
    graph.emulate(patch)
    properties = SimpleNamespace(name="no GPU, a dry run", major=9, minor=0, L2_cache_size=2**14, total_memory=0)
    properties.multi_processor_count = 1
    played: dict[str, Any] = {
        "Event": Event,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: None,
        "get_device_properties": lambda index=0: properties,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 0,
        "memory_allocated": lambda: 0,
    }
    for name, value in played.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(device_time, "QUEUED_DEVICES", {"cpu", "cuda"})
    patch.setattr(limits, "COLD_BYTES", {"cpu": 2**12})
    patch.setattr(limits, "SQUARE", {"cpu": 32})
    patch.setattr(profiling, "KIND", DeviceType.CPU)
    patch.setattr(step, "graph_refuses", lambda device: None)

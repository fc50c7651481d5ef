"""Compare every launch that reaches the driver with its description, which is what executors get."""

from __future__ import annotations

import contextlib
import struct
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import pytest
from torch import Tensor

from mmmae_kernels.gpu import launch as door
from mmmae_kernels.gpu.compilation import kernel_source
from mmmae_kernels.gpu.config import Config, Launch
from mmmae_kernels.gpu.executors import StandInGpu, execute_by
from mmmae_kernels.gpu.launch import describe_launch
from mmmae_kernels.gpu.plans import Plan, key_and_pointers
from tests.emulator.stub_driver import Started, StubDriver

FORMATS = {"i1": "<b", "i32": "<i", "i64": "<q", "u64": "<Q", "fp32": "<f"}


class Launches:
    """How often each kernel was started: through Triton (`first`), and by a plan (`planned`)."""

    def __init__(self) -> None:
        self.first: Counter[str] = Counter()
        self.planned: Counter[str] = Counter()


@contextlib.contextmanager
def checked(driver: StubDriver, target: str) -> Iterator[Launches]:
    """Start the launches of the block on the stub; raise AssertionError where one differs from its description."""
    launches, start, gpu = Launches(), door.start, StandInGpu(target)

    def checked_start(
        plans: dict[Any, Plan], describe: Any, tensors: tuple[Tensor | None, ...], numbers: tuple[Hashable, ...]
    ) -> Config:
        known = set(plans)
        with driver.recorded() as started:
            config = start(plans, describe, tensors, numbers)
        described = describe_launch(target, describe, tensors, numbers)
        if 0 in described.grid(config.constants):
            assert not started
            return config
        key, _ = key_and_pointers(describe, tensors, numbers)
        (launches.planned if key in known else launches.first)[described.kernel.fn.__name__] += 1
        (made,) = started
        check(made, plans[key], described, target)
        return config

    with pytest.MonkeyPatch.context() as patch, execute_by(gpu):
        patch.setattr(door, "start", checked_start)
        yield launches


def check(made: Started, plan: Plan, described: Launch, target: str) -> None:
    """Compare the kernel that was started, its specialisation, the grid, and each parameter."""
    name, config = described.kernel.fn.__name__, described.configs[0]
    source, options = kernel_source(described.kernel, described.arguments, config, target)
    compiled = plan.compiled
    assert plan.config == config
    assert plan.start.function is not compiled.run, (
        "Triton's launcher has changed: plans call it, not the C function that it ends in"
    )
    assert made.function == compiled.function, f"{name}: another kernel was started"
    assert compiled.src.fn is described.kernel
    for what in ("signature", "constants", "attrs"):
        assert getattr(compiled.src, what) == getattr(source, what), f"{name}: compiled for other {what}"
    for option in ("num_warps", "num_stages", "maxnreg"):
        assert getattr(compiled.metadata, option) == options[option], f"{name}: compiled with another {option}"
    assert made.grid == (*described.grid(config.constants), 1, 1)[:3], f"{name}: another grid"
    assert made.block == (32 * config.warps, 1, 1)
    assert (made.shared, made.stream) == (compiled.metadata.shared, 0)
    values = {**described.arguments, **config.constants}
    wanted = [packed(values[key], kind) for key, kind in source.signature.items() if kind != "constexpr"]
    scratch = [b"\0" * 8] * 2
    assert made.parameters == wanted + scratch, f"{name}: other values reach the driver"


def packed(value: Any, kind: str) -> bytes:
    """Return the bytes of a parameter of one of Triton's types."""
    if isinstance(value, Tensor):
        return struct.pack("<Q", value.data_ptr())
    return struct.pack(FORMATS[kind], value)

"""Substitutes for a GPU that receive the launches of Triton kernels: a recorder, an emulator, or a stand-in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from .config import Config, Launch


class Executor(Protocol):
    """Receives launches for the architecture `target`, for example `sm80`, and returns the config that it used."""

    target: str

    def __call__(self, launch: Launch) -> Config: ...


class StandInGpu:
    """A GPU of the architecture `target`, which all tensors are assumed to be on.

    Launches are planned and started as on a real GPU, by Triton's active driver, which has to be for that architecture.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.plans: dict[Any, Any] = {}


Substitute: TypeAlias = "Executor | StandInGpu"
_executors: list[Substitute] = []


@contextlib.contextmanager
def execute_by(executor: Substitute) -> Iterator[None]:
    """Pass every launch inside the `with` block to `executor`; tensors may be on any device."""
    _executors.append(executor)
    try:
        yield
    finally:
        _executors.pop()


def current() -> Substitute | None:
    """Return the executor of the innermost `execute_by`, or None if launches go to the GPU."""
    return _executors[-1] if _executors else None


def current_target() -> str | None:
    """Return the architecture of the current executor, or None if launches go to the GPU."""
    return _executors[-1].target if _executors else None

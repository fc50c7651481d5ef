"""What takes Triton's launches in place of the GPU that tensors lie on: a recorder, an emulator, or a stand-in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from .config import Config, Launch


class Executor(Protocol):
    """Takes launches for the architecture `target`, `sm80` for instance, and tells by which config."""

    target: str

    def __call__(self, launch: Launch) -> Config: ...


class StandInGpu:
    """A GPU of the architecture `target` on which all tensors are taken to lie.

    Launches are planned and started as on a real one, by Triton's active driver, which has to be for that architecture.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.plans: dict[Any, Any] = {}


Substitute: TypeAlias = "Executor | StandInGpu"
_executors: list[Substitute] = []


@contextlib.contextmanager
def execute_by(executor: Substitute) -> Iterator[None]:
    """Hand every launch in the block to `executor`; tensors may then lie on any device."""
    _executors.append(executor)
    try:
        yield
    finally:
        _executors.pop()


def current() -> Substitute | None:
    """That of the innermost `execute_by`, or None where the GPU itself takes launches."""
    return _executors[-1] if _executors else None

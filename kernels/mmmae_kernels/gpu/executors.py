"""What takes Triton's launches in place of a GPU: a recorder, or an emulator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .launch import Config, Launch


class Executor(Protocol):
    """Takes launches for the architecture `target`, `sm80` for instance, and tells by which config."""

    target: str

    def __call__(self, launch: Launch) -> Config: ...


_executors: list[Executor] = []


@contextlib.contextmanager
def execute_by(executor: Executor) -> Iterator[None]:
    """Hand every launch in the block to `executor`; tensors may then lie on any device."""
    _executors.append(executor)
    try:
        yield
    finally:
        _executors.pop()


def current() -> Executor | None:
    """That of the innermost `execute_by`, or None where the GPU itself takes launches."""
    return _executors[-1] if _executors else None

"""Which implementation serves a call, and the reason why each other one does not."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .cpu import library
from .gpu import executors

BACKENDS = ("triton", "native", "eager")  # in order of preference
CHOICES = ("auto", *BACKENDS)

Reason = str | None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        function: computes the op, with the op's own signature.
        can_run: takes the op's arguments; None if it serves the call, else the reason why it does not.
        available: None if it can serve any call on this machine, else the reason why not.
    """

    function: Callable[..., Any]
    can_run: Callable[..., Reason] = lambda *args, **kwargs: None
    available: Callable[[], Reason] = lambda: None


_implementations: dict[str, dict[str, Implementation | None]] = {}
_forced: list[str] = []


def register(op: str, *, backends: tuple[str, ...] = BACKENDS, **implementations: Implementation) -> None:
    """Name the implementations of an op among its `backends`, the preferred first; the last, `eager`, serves all."""
    _implementations[op] = {backend: implementations.get(backend) for backend in backends}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op in the block by one backend: `eager`, `native`, `triton`, or `auto` for the best that can.

    The choice is the process's (threads that choose differently would disturb each other), as is the environment
    variable `MMMAE_KERNELS`, which it overrides. A compiled function keeps the choice that it was traced with.

    Raises:
        ValueError: the name is not a backend's, or (from an op in the block) the backend can't serve a call.
    """
    _forced.append(check_backend(name))
    try:
        yield
    finally:
        _forced.pop()


def check_backend(name: str, source: str = "kernels") -> str:
    """The name itself, or a ValueError that says where it is from and lists the known ones."""
    if name not in CHOICES:
        raise ValueError(f"{source} is {name!r}, allowed is one of {', '.join(CHOICES)}")
    return name


def current_backend() -> str:
    """The backend in force: of the innermost `use_backend`, else of `MMMAE_KERNELS`, else `auto`."""
    return _forced[-1] if _forced else check_backend(os.environ.get("MMMAE_KERNELS", "auto"), "MMMAE_KERNELS")


def choose(op: str, *args: Any, forced: str | None = None) -> Callable[..., Any]:
    """The function that serves this call of `op`; see `choose_backend`."""
    implementation = _implementations[op][choose_backend(op, *args, forced=forced)]
    assert implementation is not None
    return implementation.function


def choose_backend(op: str, *args: Any, forced: str | None = None) -> str:
    """The backend that serves this call of `op`.

    Args:
        op: its name.
        args: those that its implementations take.
        forced: a backend's name or `auto`; None is the backend in force.

    Raises:
        ValueError: a backend is forced that can't serve the call; the message carries its reason.
    """
    forced = current_backend() if forced is None else forced
    candidates = _implementations[op] if forced == "auto" else (forced,)
    for backend in candidates:
        reason = _reason(op, backend, *args)
        if reason is None:
            return backend
    raise ValueError(f"{op}: the backend {backend!r} can't serve this call: {reason}")


def explain(op: str | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Per implementation of `op`: "serves", or the reason why it does not.

    Args:
        op: an op's name; None for a dict of all ops.
        args, kwargs: those of a call; without any the answer is for this machine, not for a call.
    """
    if op is None:
        return {name: explain(name) for name in _implementations}
    if op not in _implementations:
        raise ValueError(f"op is {op!r}, allowed is one of {', '.join(_implementations)}")
    return {backend: _reason(op, backend, *args, **kwargs) or "serves" for backend in _implementations[op]}


def _reason(op: str, backend: str, *args: Any, **kwargs: Any) -> Reason:
    implementation = _implementations[op][backend]
    if implementation is None:
        return "no such implementation"
    reason = implementation.available()
    if reason is None and (args or kwargs):
        reason = implementation.can_run(*args, **kwargs)
    return reason


def in_debug_mode() -> bool:
    """Whether values are checked that cost a pass over the data or a device synchronisation: `MMMAE_DEBUG=1`."""
    return os.environ.get("MMMAE_DEBUG", "0") not in ("", "0")


TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Known at import: torch.compile asks, and can't trace what these take.
_has_triton = importlib.util.find_spec("triton") is not None
_interprets = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def triton_unavailable() -> Reason:
    """None if Triton kernels can run on this machine, else one line that says why not."""
    if not _has_triton:
        return "triton is not installed"
    if not (torch.cuda.is_available() or _interprets or executors.current() is not None):
        return "there is no GPU that torch can use"
    return None


def triton_refuses(tensors: Iterable[tuple[str, Tensor | None]]) -> Reason:
    """None if Triton kernels take these floating point tensors, else the reason why not."""
    unavailable = triton_unavailable()
    if unavailable is not None:
        return unavailable
    for name, tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not _interprets and executors.current() is None:
            return f"{name} lies on {tensor.device}, Triton kernels run on GPUs"
        if tensor.dtype not in TRITON_DTYPES:
            return f"{name} has dtype {tensor.dtype}, Triton kernels take float32, float16 and bfloat16"
    return None


native_unavailable = library.unavailable_reason


def native_refuses(tensors: Iterable[tuple[str, Tensor | None]]) -> Reason:
    """None if native kernels take these floating point tensors, else the reason why not."""
    unavailable = native_unavailable()
    if unavailable is not None:
        return unavailable
    for name, tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{name} lies on {tensor.device}, native kernels run on the CPU"
        if tensor.dtype != torch.float32:
            return f"{name} has dtype {tensor.dtype}, native kernels take float32"
    return None


def kernels(op: str, backend: str) -> Any:
    """The module with an op's kernels for `native` or `triton`, under the same names in both."""
    return importlib.import_module(f"mmmae_kernels.{op}.{'gpu' if backend == 'triton' else 'cpu'}")

"""Which backend serves a call: decided once for each kind of call, with the reason why each other one does not."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .cpu import library
from .gpu import executors

BACKENDS = ("triton", "native", "eager")  # in order of preference
CHOICES = ("auto", *BACKENDS)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Reason = str | None
Arguments = Mapping[str, Any]

# Known at import: torch.compile asks, and can't trace what these take.
_has_triton = importlib.util.find_spec("triton") is not None
_interprets = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

_forced: list[str] = []


def _refuses_nothing(arguments: Arguments) -> Reason:
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        function: computes the op; it takes the op's arguments in order.
        refuses: takes the op's arguments by name; returns None if it serves the call, else the reason.
        unavailable: returns None if it can serve any call on this machine, else the reason.
    """

    function: Callable[..., Any]
    refuses: Callable[[Arguments], Reason] = _refuses_nothing
    unavailable: Callable[[], Reason] = lambda: None


class Op:
    """The implementations of an op, and which of them serves each kind of call.

    Args:
        definition: the op in plain PyTorch, which names the arguments.
        implementations: backend -> implementation, the preferred first.

    Attributes:
        served: the function that serves each kind of call that was decided.
    """

    def __init__(self, name: str, definition: Callable[..., Any], implementations: Mapping[str, Implementation]):
        self.name, self.implementations = name, dict(implementations)
        self.parameters = tuple(inspect.signature(definition).parameters)
        self.selected: dict[Hashable, Callable[..., Any]] = {}
        _ops.append(self)

    def select(self, kind: Hashable, *arguments: Any, forced: str | None = None) -> Callable[..., Any]:
        """Return the function that serves a call.

        Args:
            kind: all of the call that a refusal may depend on; calls of one kind are decided once.
            arguments: those of the op, in order; looked at when the kind is new.
            forced: a backend's name or `auto`; None for the backend in force.

        Raises:
            ValueError: a backend is forced that can't serve the call; the message carries its reason.
        """
        forced = current_backend() if forced is None else forced
        if torch.compiler.is_compiling():
            return self.implementations[self.choose(forced, *arguments)].function
        key = (kind, forced, executors.current() is None)
        function = self.selected.get(key)
        if function is None:
            function = self.selected[key] = self.implementations[self.choose(forced, *arguments)].function
        return function

    def choose(self, forced: str, *arguments: Any) -> str:
        """Return the backend that serves a call; for the arguments and errors see `select`."""
        named = dict(zip(self.parameters, arguments))  # noqa: B905  # those left out have defaults
        reason: Reason = None
        for backend in self.implementations if forced == "auto" else (forced,):
            reason = self.reason(backend, named)
            if reason is None:
                return backend
        raise ValueError(f"{self.name}: backend {forced!r} does not support this call: {reason}")

    def reason(self, backend: str, arguments: Arguments | None = None) -> Reason:
        """Return None if `backend` serves a call, or any call where there are no arguments, else the reason."""
        implementation = self.implementations.get(backend)
        if implementation is None:
            return "no such implementation"
        return implementation.unavailable() or (None if arguments is None else implementation.refuses(arguments))

    def reset(self) -> None:
        """Decide anew from here on."""
        self.selected.clear()


_ops: list[Op] = []


def declare(
    name: str,
    definition: Callable[..., Any],
    function: Callable[[str], Callable[..., Any]],
    *,
    native_refuses: Callable[[Arguments], Reason] = _refuses_nothing,
    triton_refuses: Callable[[Arguments], Reason] = _refuses_nothing,
) -> Op:
    """Return an op of the backends `triton`, `native` and `eager`, the last of which is its definition.

    Args:
        name: the op's, as `explain` knows it.
        definition: the op in plain PyTorch.
        function: given `triton` or `native`, the function that computes the op by that backend's kernels.
        native_refuses, triton_refuses: what these kernels refuse beyond what no kernel of theirs takes.
    """
    return Op(
        name,
        definition,
        {
            "triton": Implementation(function("triton"), triton_refuses, triton_unavailable),
            "native": Implementation(function("native"), native_refuses, native_unavailable),
            "eager": Implementation(definition),
        },
    )


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op in the block by one backend: `eager`, `native`, `triton`, or `auto` for the best that can.

    `eager` reaches attention too, unless a call or `MMMAE_ATTENTION` names another backend for it.

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
    """Return the name, or raise ValueError that says where it is from and lists the known ones."""
    if name not in CHOICES:
        raise ValueError(f"{source} is {name!r}, must be one of {', '.join(CHOICES)}")
    return name


def current_backend() -> str:
    """Return the backend in force: of the innermost `use_backend`, else of `MMMAE_KERNELS`, else `auto`."""
    return _forced[-1] if _forced else check_backend(os.environ.get("MMMAE_KERNELS", "auto"), "MMMAE_KERNELS")


def explain(op: str | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Tell, per implementation of `op`, that it "serves", or the reason why it does not.

    Args:
        op: an op's name; None for a dict of all ops.
        args, kwargs: those of a call; without any the answer is for this machine, not for a call.
    """
    ops = {known.name: known for known in _ops}
    if op is None:
        return {name: explain(name) for name in ops}
    if op not in ops:
        raise ValueError(f"op is {op!r}, must be one of {', '.join(ops)}")
    known = ops[op]
    named = {**dict(zip(known.parameters, args)), **kwargs} or None  # noqa: B905
    return {backend: known.reason(backend, named) or "serves" for backend in known.implementations}


def reset() -> None:
    """Decide anew which backend serves each kind of call, as after a change of what this machine offers."""
    for op in _ops:
        op.reset()


def in_debug_mode() -> bool:
    """Return whether values are checked that cost a pass over the data or a device synchronisation: `MMMAE_DEBUG=1`."""
    return os.environ.get("MMMAE_DEBUG", "0") not in ("", "0")


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `torch.compile` take what a function returns for a constant, and not look into it.

    As `torch.compiler.assume_constant_result`, which would import the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def tensors_of(arguments: Arguments) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among a call's arguments, by name."""
    return ((name, argument) for name, argument in arguments.items() if isinstance(argument, Tensor))


def triton_unavailable() -> Reason:
    """Return None if Triton kernels can run on this machine, else one line that says why not."""
    if not _has_triton:
        return "triton is not installed"
    if not (torch.cuda.is_available() or _interprets or executors.current() is not None):
        return "there is no GPU that torch can use"
    return None


def triton_refuses(tensors: Iterable[tuple[str, Tensor]]) -> Reason:
    """Return None if Triton kernels take these floating point tensors, else the reason why not."""
    for name, tensor in tensors:
        if tensor.device.type != "cuda" and not _interprets and executors.current() is None:
            return f"{name} is on {tensor.device}, Triton kernels run on GPUs"
        if tensor.dtype not in TRITON_DTYPES:
            return f"{name} has dtype {tensor.dtype}, Triton kernels take float32, float16 and bfloat16"
    return None


native_unavailable = library.unavailable_reason


def native_refuses(tensors: Iterable[tuple[str, Tensor]]) -> Reason:
    """Return None if native kernels take these floating point tensors, else the reason why not."""
    for name, tensor in tensors:
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, native kernels run on the CPU"
        if tensor.dtype != torch.float32:
            return f"{name} has dtype {tensor.dtype}, native kernels take float32"
    return None

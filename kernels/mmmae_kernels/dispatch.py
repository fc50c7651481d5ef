"""Choice of the backend for a call: made once per dispatch key, with the reason why each other backend is refused."""

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
from .gpu import architecture, executors

BACKENDS = ("triton", "native", "eager")  # in order of preference
CHOICES = ("auto", *BACKENDS)
HALVES = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (torch.float32, *HALVES)  # of Triton and native kernels
OLDEST_TRITON = (3, 6)  # as in pyproject.toml

Reason = str | None
Arguments = Mapping[str, Any]

# Computed at import: code under torch.compile asks for these, and the calls that answer can't be traced.
_has_triton = importlib.util.find_spec("triton") is not None
_interprets = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

_forced: list[str] = []


def _refuses_nothing(arguments: Arguments) -> Reason:
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        function: computes the op, given its arguments in order.
        refuses: returns None if the implementation supports a call, given its arguments by name, else the reason.
        unavailable: returns None if the implementation can run on this machine, else the reason.
    """

    function: Callable[..., Any]
    refuses: Callable[[Arguments], Reason] = _refuses_nothing
    unavailable: Callable[[], Reason] = lambda: None


class Op:
    """An op with its implementations, which selects one of them for each call.

    Args:
        definition: the op in plain PyTorch; its signature names the arguments.
        implementations: backend -> implementation, in order of preference.

    Attributes:
        selected: dispatch key -> function, filled as calls arrive.
    """

    def __init__(self, name: str, definition: Callable[..., Any], implementations: Mapping[str, Implementation]):
        self.name, self.implementations = name, dict(implementations)
        self.parameters = tuple(inspect.signature(definition).parameters)
        self.selected: dict[Hashable, Callable[..., Any]] = {}
        _ops.append(self)

    def select(self, key: Hashable, *arguments: Any, requested: str | None = None) -> Callable[..., Any]:
        """Return the function that computes a call.

        Args:
            key: everything about the call that a refusal may depend on. Calls with the same key get the same function.
            arguments: the op's arguments, in order; only read for a new key.
            requested: a backend's name or `auto`; None means the current backend.

        Raises:
            ValueError: the requested backend does not support the call; the message has the reason.
        """
        requested = current_backend() if requested is None else requested
        if torch.compiler.is_compiling():
            return self.implementations[self.choose(requested, *arguments)].function
        key = (key, requested, executors.current_target())
        function = self.selected.get(key)
        if function is None:
            function = self.selected[key] = self.implementations[self.choose(requested, *arguments)].function
        return function

    def select_checked(
        self, key: Callable[..., Hashable], check: Callable[..., None], *arguments: Any
    ) -> Callable[..., Any]:
        """Return the function that computes a call by the current backend; only the first call with a key is checked.

        Args:
            key: returns everything about the op's arguments that the check or a refusal may depend on. It may raise
                AttributeError, IndexError or TypeError for arguments that the check refuses.
            check: raises ValueError unless the op's arguments match.
            arguments: the op's arguments, in order.
        """
        if torch.compiler.is_compiling():
            check(*arguments)
            return self.select(None, *arguments)
        requested = current_backend()
        try:
            found = key(*arguments), requested, executors.current_target()
        except (AttributeError, IndexError, TypeError):
            check(*arguments)
            raise
        function = self.selected.get(found)
        if function is None:
            check(*arguments)
            function = self.selected[found] = self.implementations[self.choose(requested, *arguments)].function
        return function

    def choose(self, requested: str, *arguments: Any) -> str:
        """Return the name of the backend for a call; see `select` for arguments and errors."""
        named = dict(zip(self.parameters, arguments))  # noqa: B905  # arguments that are left out have defaults
        reason: Reason = None
        for backend in self.implementations if requested == "auto" else (requested,):
            reason = self.reason(backend, named)
            if reason is None:
                return backend
        raise ValueError(f"{self.name}: backend {requested!r} does not support this call: {reason}")

    def reason(self, backend: str, arguments: Arguments | None = None) -> Reason:
        """Return None if `backend` supports a call (without arguments: can run on this machine), else the reason."""
        implementation = self.implementations.get(backend)
        if implementation is None:
            return "no such implementation"
        return implementation.unavailable() or (None if arguments is None else implementation.refuses(arguments))

    def reset(self) -> None:
        """Discard all selections made so far."""
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
    """Create an op with the backends `triton`, `native` and `eager`, where `eager` runs the definition.

    Args:
        name: name of the op, used by `explain`.
        definition: the op in plain PyTorch.
        function: returns the function that computes the op by the kernels of `triton` or `native`.
        native_refuses, triton_refuses: `Implementation.refuses` of these two backends.
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
    """Run every op inside the `with` block on one backend.

    The setting holds for the whole process, all threads included, and overrides the environment variable
    `MMMAE_KERNELS`. Attention follows `eager` too, unless a call or `MMMAE_ATTENTION` names another backend for it. A
    compiled function keeps the backend that it was traced with.

    Args:
        name: `eager`, `native`, `triton`, or `auto` for the fastest one that supports a call.

    Raises:
        ValueError: the name is unknown. Ops inside the block raise it for a call that the backend does not support.

    Example:
        >>> x, weight, bias = torch.randn(2, 8), torch.ones(8), torch.zeros(8)
        >>> with use_backend("eager"):
        ...     total, norm = add_layer_norm(x, None, weight, bias)
        >>> norm.shape
        torch.Size([2, 8])
    """
    _forced.append(check_backend(name))
    try:
        yield
    finally:
        _forced.pop()


def check_backend(name: str, source: str = "kernels") -> str:
    """Return `name`, or raise ValueError if it is unknown; `source` names the setting in the message."""
    if name not in CHOICES:
        raise ValueError(f"{source} is {name!r}, must be one of {', '.join(CHOICES)}")
    return name


def current_backend() -> str:
    """Return the backend set by the innermost `use_backend`, else by `MMMAE_KERNELS`, else `auto`."""
    return _forced[-1] if _forced else check_backend(os.environ.get("MMMAE_KERNELS", "auto"), "MMMAE_KERNELS")


def explain(op: str | None = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return for each backend of an op `"serves"`, or the reason why it can't be used.

    Args:
        op: name of an op; None returns a dict of all ops.
        args, kwargs: arguments of a call. Without them the answer is about this machine, not about a call.

    Raises:
        ValueError: there is no op of this name.

    Example:
        >>> volume = torch.zeros(1, 1, 2, 4, 4, dtype=torch.float64)
        >>> explain("patchify", volume, (1, 2, 2))["native"]
        'volume has dtype torch.float64, native kernels take float32, float16 and bfloat16'
        >>> explain("patchify")["eager"]
        'serves'
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
    """Discard all backend selections of all ops, for use after a change of what this machine offers."""
    for op in _ops:
        op.reset()


@contextlib.contextmanager
def assume_available(backend: str) -> Iterator[None]:
    """Choose implementations inside the `with` block as if those of `backend` could run on this machine.

    Calls of them can then be traced or recorded, but not run.
    """
    changed = [(op, op.implementations[backend]) for op in _ops if backend in op.implementations]
    for op, implementation in changed:
        op.implementations[backend] = dataclasses.replace(implementation, unavailable=lambda: None)
    reset()
    try:
        yield
    finally:
        for op, implementation in changed:
            op.implementations[backend] = implementation
        reset()


def in_debug_mode() -> bool:
    """Return whether `MMMAE_DEBUG=1` asks for checks that cost a pass over the data or a device synchronisation."""
    return os.environ.get("MMMAE_DEBUG", "0") not in ("", "0")


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function so that `torch.compile` calls it once, outside the trace, and treats the result as a constant.

    Does the same as `torch.compiler.assume_constant_result`, which would import the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def tensors_of(arguments: Arguments) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each argument that is a tensor."""
    return ((name, argument) for name, argument in arguments.items() if isinstance(argument, Tensor))


def triton_unavailable() -> Reason:
    """Return None if Triton kernels can run on this machine, else the reason in one line."""
    if not _has_triton:
        return "triton is not installed"
    needs_gpu = not _interprets and executors.current() is None
    if needs_gpu and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return _triton_too_old() or (_gpus_refuse() if needs_gpu else None)


@constant_when_compiled
def _triton_too_old() -> Reason:
    """Return None if the installed Triton has what the launch path and the compilation call, else the reason."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"triton is {triton.__version__}, expected {'.'.join(map(str, OLDEST_TRITON))} or newer"
    return None


@constant_when_compiled
def _gpus_refuse() -> Reason:
    """Return None if Triton kernels support one of the GPUs, else the reason why not the first one."""
    reasons = [device_refuses(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return None if None in reasons else f"the GPU is {reasons[0]}"


@constant_when_compiled
def device_refuses(device: torch.device) -> Reason:
    """Return None if Triton kernels support the architecture of a device, else the architecture and the reason."""
    target = architecture.target_of(device)
    needs = architecture.refuses(target)
    return None if needs is None else f"{target}, {needs}"


def triton_refuses(tensors: Iterable[tuple[str, Tensor]]) -> Reason:
    """Return None if Triton kernels support these floating point tensors, else the reason."""
    for name, tensor in tensors:
        if tensor.device.type != "cuda" and not _interprets and executors.current() is None:
            return f"{name} is on {tensor.device}, Triton kernels run on GPUs"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{name} has dtype {tensor.dtype}, Triton kernels take float32, float16 and bfloat16"
        reason = device_refuses(tensor.device)
        if reason is not None:
            return f"{name} is on {reason}"
    return None


native_unavailable = library.unavailable_reason


def native_refuses(tensors: Iterable[tuple[str, Tensor]]) -> Reason:
    """Return None if the native kernels support these floating point tensors, else the reason."""
    for name, tensor in tensors:
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, native kernels run on the CPU"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{name} has dtype {tensor.dtype}, native kernels take float32, float16 and bfloat16"
    return None

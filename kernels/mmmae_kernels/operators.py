"""Calls of kernels: as Python functions in eager mode, as torch operators where torch traces, exports or counts.

An operator costs many times as much as a Python call, so eager mode avoids it. `torch.compile`, `torch.export`, FLOP
counters and fake tensors need it: they can't see into a kernel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("mmmae", "DEF")  # type: ignore[no-untyped-call]
_PACKAGE = __package__
_MODULES = {"triton": "gpu", "native": "cpu"}


class Kernels:
    """The kernels of a backend as attributes, imported on first use."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        module = importlib.import_module(f"{_PACKAGE}.{_folders[name]}.{_MODULES[self._backend]}")
        function: Callable[..., Any] = getattr(module, name)
        setattr(self, name, function)
        return function


class Operators:
    """The operators of the kernels as attributes, with the backend bound."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"there is no operator {name!r}")


_folders: dict[str, str] = {}  # kernel -> folder of its op
_direct = {backend: Kernels(backend) for backend in _MODULES}
_traced = {backend: Operators() for backend in _MODULES}
# Triton's kernels as functions, and calls that are not ours, such as attention's, as operators.
_launching: dict[str, Any] = {**_traced, "triton": Kernels("triton")}
_launches_are_watched = False


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define the operator `mmmae::NAME` and return it.

    Args:
        schema: passed to `torch.library.Library.define`.
        function: computes the results, on any device.
        fake: takes the same arguments and returns empty tensors of the results' shapes and dtypes.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mmmae::{name}", fake, lib=_LIBRARY)
    packet: Callable[..., Any] = getattr(torch.ops.mmmae, name)
    return packet


def declare_operator(
    folder: str, schema: str, fake: Callable[..., Any], *, name: str | None = None, fake_needs_backend: bool = False
) -> None:
    """Declare a kernel that an op's `gpu.py` and `cpu.py` both define, and define its operator.

    Args:
        folder: folder of the op.
        schema: schema of the kernel, as for `define`. The operator takes one more argument, the backend.
        fake: takes the kernel's arguments and returns empty tensors of the results' shapes and dtypes.
        name: name of the operator; None means the kernel's name.
        fake_needs_backend: whether `fake` takes the backend as a last argument, because a result depends on it.
    """
    kernel, rest = schema.split("(", 1)
    arguments, results = rest.split(") -> ", 1)
    _folders[kernel] = folder

    def run(*call: Any) -> Any:
        given = [tuple(argument) if isinstance(argument, list) else argument for argument in call[:-1]]
        computed = getattr(_direct[call[-1]], kernel)(*given)
        if not isinstance(computed, tuple):
            return computed
        if not any(result is None for result in computed):
            return computed
        # A kernel returns None for a result that was not requested or that its backend has no use for; an operator has
        # to return the tensor that its fake promises.
        promised = promise(*call)
        return tuple(other if result is None else result for result, other in zip(computed, promised, strict=True))

    definition = f"{name or kernel}({arguments}, str backend) -> {results}"
    promise: Callable[..., Any] = fake if fake_needs_backend else lambda *call: fake(*call[:-1])
    packet = define(definition, run, promise)
    for backend, operators in _traced.items():
        setattr(operators, kernel, _bound(packet, backend))


def _bound(packet: Callable[..., Any], backend: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return packet(*arguments, backend)

    return call


def declare_calls(**calls: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    """Add functions to the kernels of each backend, by name: a pair of Python function and operator."""
    for name, (function, operator) in calls.items():
        for backend in _MODULES:
            setattr(_direct[backend], name, function)
            setattr(_traced[backend], name, operator)
            setattr(_launching[backend], name, operator)


_PLAIN = (Tensor, torch.nn.Parameter)


def needs_operators(tensor: Tensor) -> bool:
    """Return whether kernels on `tensor` must be called as operators.

    That is so under a compiler, a tracer or a dispatch mode, and for tensor subclasses and meta tensors.
    """
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in _PLAIN
        or tensor.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def kernels_for(tensor: Tensor, backend: str) -> Any:
    """Return the kernels of `triton` or `native`, as operators if `needs_operators(tensor)`."""
    if not needs_operators(tensor):
        return _direct[backend]
    return (_launching if _launches_are_watched else _traced)[backend]


@contextlib.contextmanager
def watch_launches() -> Iterator[None]:
    """Call Triton's kernels as functions inside the `with` block even under a dispatch mode.

    An executor then receives their launches, and the mode sees the operators of torch beside them. Calls of libraries,
    as those of attention, remain operators.
    """
    global _launches_are_watched
    before, _launches_are_watched = _launches_are_watched, True
    try:
        yield
    finally:
        _launches_are_watched = before


def fast_apply(function: Any) -> Callable[..., Any]:
    """Return an `autograd.Function`'s `apply` that skips the preparations for torch.func in eager mode."""
    direct: Callable[..., Any] = super(torch.autograd.Function, function).apply

    def run(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return function.apply(*arguments)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("fused kernels don't support torch.func transforms; use_backend('eager') does")
        return direct(*arguments)

    return run


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `backward` of an `autograd.Function` so that it raises under `create_graph=True`.

    Autograd can't see into the kernels, so it would silently treat the gradients as constants.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients of fused kernels can't be differentiated again; use_backend('eager') supports it"
            )
        return backward(ctx, *grads)

    return run

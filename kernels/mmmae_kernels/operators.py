"""How kernels are called: straight where Python runs, through operators where torch traces, exports or counts.

An operator costs many times a Python call, so eager mode never pays for one. It is what `torch.compile`,
`torch.export`, FLOP counters and fake tensors see in a kernel's place.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("mmmae", "DEF")  # type: ignore[no-untyped-call]
_PACKAGE = __package__
_MODULES = {"triton": "gpu", "native": "cpu"}


class Kernels:
    """The kernels of a backend by name, found when they are first called."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        module = importlib.import_module(f"{_PACKAGE}.{_folders[name]}.{_MODULES[self._backend]}")
        function: Callable[..., Any] = getattr(module, name)
        setattr(self, name, function)
        return function


class Operators:
    """The operators under the names of their kernels, bound to a backend."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"there is no operator {name!r}")


_folders: dict[str, str] = {}  # of a kernel's name: its op's folder
_direct = {backend: Kernels(backend) for backend in _MODULES}
_traced = {backend: Operators() for backend in _MODULES}


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define the operator `mmmae::NAME` and return it.

    Args:
        schema: as `torch.library.Library.define` takes it.
        function: computes the results, on any device.
        fake: takes the same arguments and returns tensors like the results, without data.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mmmae::{name}", fake, lib=_LIBRARY)
    packet: Callable[..., Any] = getattr(torch.ops.mmmae, name)
    return packet


def declare_operator(folder: str, schema: str, fake: Callable[..., Any], *, name: str | None = None) -> None:
    """Declare a kernel that `gpu.py` and `cpu.py` of an op have under one name, and its operator.

    Args:
        folder: the op's.
        schema: name, arguments and results as `define` takes them; the kernel's arguments have the same order. The
            operator has one argument more, the backend.
        fake: takes the kernel's arguments and returns tensors like its results, without data.
        name: the operator's, where it is another than the kernel's.
    """
    kernel, rest = schema.split("(", 1)
    arguments, results = rest.split(") -> ", 1)
    _folders[kernel] = folder

    def run(*call: Any) -> Any:
        given = [tuple(argument) if isinstance(argument, list) else argument for argument in call[:-1]]
        computed = getattr(_direct[call[-1]], kernel)(*given)
        if not isinstance(computed, tuple):
            return computed
        # What was not asked for is None from a kernel, and a tensor of no elements from an operator.
        some = next(argument for argument in given if isinstance(argument, Tensor))
        return tuple(some.new_empty(0) if result is None else result for result in computed)

    definition = f"{name or kernel}({arguments}, str backend) -> {results}"
    packet = define(definition, run, lambda *call: fake(*call[:-1]))
    for backend, operators in _traced.items():
        setattr(operators, kernel, _bound(packet, backend))


def _bound(packet: Callable[..., Any], backend: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return packet(*arguments, backend)

    return call


def declare_calls(**calls: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    """Give each backend's kernels further functions: for each name one to call straight, and its operator."""
    for name, (straight, operator) in calls.items():
        for backend in _MODULES:
            setattr(_direct[backend], name, straight)
            setattr(_traced[backend], name, operator)


_PLAIN = (Tensor, torch.nn.Parameter)


def needs_operators(tensor: Tensor) -> bool:
    """Return whether operators must be seen: by a compiler, a tracer, a dispatch mode, a subclass, or without data."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in _PLAIN
        or tensor.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def kernels_for(tensor: Tensor, backend: str) -> Any:
    """Return the kernels of `triton` or `native`, as operators where `tensor` is watched."""
    return (_traced if needs_operators(tensor) else _direct)[backend]


def fast_apply(function: Any) -> Callable[..., Any]:
    """Return `function.apply` of an `autograd.Function`, in eager mode without what it does for torch.func's sake."""
    straight: Callable[..., Any] = super(torch.autograd.Function, function).apply

    def run(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return function.apply(*arguments)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("fused kernels take no transforms of torch.func; use_backend('eager') does")
        return straight(*arguments)

    return run


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to differentiate the `backward` of an `autograd.Function` again: autograd does not see the kernels in it.

    Whatever it gave under `create_graph=True` would pass for a constant.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a gradient of fused kernels can't be differentiated again; use_backend('eager') gives one that can"
            )
        return backward(ctx, *grads)

    return run

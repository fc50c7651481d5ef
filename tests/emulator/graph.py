"""CUDA graphs on the CPU: recorded operations take effect when they are replayed, on memory where it is then."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.emulator.device_waits import innermost_line

CHECKS = ("kernels/mmmae_kernels/checks.py", "mmmae/model/inputs.py")  # of values, which are not made on a GPU


class EmulatedGraph:
    """Stands for `torch.cuda.CUDAGraph`: a list of operations with their arguments and the tensors they gave."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def replay(self) -> None:
        """Run the operations again, into the tensors that they gave when they were recorded."""
        LOG.append("replay")
        with torch.no_grad():
            for function, args, kwargs, recorded in self.operations:
                result = function(*args, **kwargs)
                for new, old in zip(_tensors(result), recorded, strict=True):
                    if new.data_ptr() != old.data_ptr():
                        old.copy_(new)


class Recording(TorchDispatchMode):
    """Records the operations of a block, and undoes at its end what they wrote into memory from before."""

    def __init__(
        self, graph: EmulatedGraph, *, stream: object, capture_error_mode: str, pool: object = "no pool"
    ) -> None:
        super().__init__()
        self.graph, self.before = graph, list[tuple[Tensor, Tensor]]()
        self.described = f"record into {pool} on {stream}, {capture_error_mode}"

    def __enter__(self) -> "Recording":
        LOG.append(self.described)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        with torch.no_grad():
            for tensor, values in reversed(self.before):
                tensor.copy_(values)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "_local_scalar_dense" in str(function):
            if innermost_line().startswith(CHECKS):
                return function(*args, **kwargs)
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(tensor, tensor.detach().clone()) for tensor in _tensors(value)]
        result = function(*args, **kwargs)
        if not function.is_view:  # a view recorded once stays what it is: nothing runs on a GPU either
            self.graph.operations.append((function, args, kwargs, _tensors(result)))
        return result


class EmulatedStream:
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, name: object = "side") -> None:
        self.name = name if isinstance(name, str) else "side"

    def wait_stream(self, other: "EmulatedStream") -> None:
        """Note it."""
        LOG.append(f"{self} waits for {other}")

    def __str__(self) -> str:
        return self.name


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


LOG: list[str] = []  # the calls that torch.cuda got, in order
CURRENT = EmulatedStream("current")


@contextlib.contextmanager
def emulated_stream(stream: EmulatedStream) -> Any:
    """Stand for `torch.cuda.stream`."""
    LOG.append(f"on {stream}")
    yield
    LOG.append(f"off {stream}")


def emulate(monkeypatch: Any) -> list[str]:
    """Put the emulation in the place of `torch.cuda`'s parts; return the log of what is asked of them."""
    LOG.clear()
    parts = {
        "CUDAGraph": EmulatedGraph,
        "graph": Recording,
        "graph_pool_handle": lambda: "the pool",
        "Stream": EmulatedStream,
        "stream": emulated_stream,
        "current_stream": lambda device=None: CURRENT,
        "set_stream": lambda stream: LOG.append(f"back to {stream}"),
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    return LOG

"""Find operations that make the host wait for the device, on a machine without one.

Meta tensors stand for those on a GPU: no kernel runs, but every operation passes through `DeviceWaits`.
"""

import traceback
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
WATCHERS = ("device_waits.py", "graph.py")

# Operations whose result has a size, or is a number, that the host must read from the device.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_dim", "masked_select", "item")
# Methods that hand a tensor's values to Python.
METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__format__", "__repr__")


class Wait(NamedTuple):
    """One wait: what it is and the innermost line of the project that caused it."""

    what: str
    where: str  # path:line, the path from the project's root


class DeviceWaits(TorchDispatchMode):
    """Collects the waits of a block in `found`: every operation on another device than the CPU is looked at.

    A number that the host reads is 0, so that a block runs on behind a wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Wait] = []
        self.operations = 0
        self._python = _PythonWaits(self.found)

    def __enter__(self) -> "DeviceWaits":
        self._python.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._python.__exit__(*raised)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        name = str(function).removeprefix("aten.")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        what = self._wait(name, args, kwargs, tensors)
        if name.startswith("_fused_adam"):  # has no meta kernel, changes tensors in place and returns nothing
            return None
        if what is None:
            return function(*args, **kwargs)
        self.found.append(Wait(what, innermost_line()))
        if name.startswith("_local_scalar_dense"):
            return False if args[0].dtype == torch.bool else 0
        if name.startswith("_to_copy") and torch.device(kwargs["device"]).type == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)

    def _wait(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> str | None:
        devices = {tensor.device.type for tensor in tensors}
        operation = name.split(".")[0]
        if devices <= {"cpu"} and operation not in ("_to_copy", "copy_"):
            return None
        if operation in READS:
            return f"{operation} reads from the device"
        if operation == "_to_copy" and kwargs.get("device") is not None:
            source, target = args[0].device.type, torch.device(kwargs["device"]).type
            return self._copy(source, target, bool(kwargs.get("non_blocking")))
        if operation in ("copy_", "copy"):
            asynchronous = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            return self._copy(args[1].device.type, args[0].device.type, asynchronous)
        if operation == "where" and "cpu" in devices:
            return "where copies a number to the device"
        if name == "masked_fill.Tensor" or name == "masked_fill_.Tensor":
            return "masked_fill reads its value from the device" if args[2].device.type != "cpu" else None
        if operation in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                return f"{operation} by a mask counts it"
            if any(index.device.type == "cpu" for index in indices):
                return f"{operation} copies an index to the device"
        if name.startswith("repeat_interleave.") and kwargs.get("output_size") is None:
            return "repeat_interleave reads its size from the device"
        return None

    @staticmethod
    def _copy(source: str, target: str, asynchronous: bool) -> str | None:
        """Return how a copy waits, or None: only an asynchronous copy to the device does not."""
        if source == target or (asynchronous and source == "cpu"):
            return None
        return f"copy from {source} to {target}"


class _PythonWaits(TorchFunctionMode):
    """Adds the waits of Python's side of an operation, which the operation itself does not show."""

    def __init__(self, found: list[Wait]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        what = self._wait(function, args, kwargs)
        if what is not None:
            self.found.append(Wait(what, innermost_line()))
        return function(*args, **kwargs)

    @staticmethod
    def _wait(function: Any, args: Any, kwargs: Any) -> str | None:
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            device = torch.device(kwargs.get("device") or torch.get_default_device())
            return "torch.tensor copies numbers to the device" if device.type != "cpu" else None
        if function in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device.type != "cpu":
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(index, (list, np.ndarray)) for index in indices):
                return "an index of numbers is copied to the device"
            if function is Tensor.__setitem__ and isinstance(args[2], (int, float)) and int in map(type, indices):
                return "a number is copied to an element on the device"
        return None


class HostReads(TorchFunctionMode):
    """Collects in `found` where a block hands values of tensors to Python, on whatever device they are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Wait] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in METHODS and args and isinstance(args[0], Tensor):
            self.found.append(Wait(f"Tensor.{name}", innermost_line()))
        return function(*args, **(kwargs or {}))


def innermost_line() -> str:
    """Return the innermost line of the project that runs now, apart from what watches it."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path.name not in WATCHERS:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "?"

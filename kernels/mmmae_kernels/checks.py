"""Argument checks shared by the ops; each raises ValueError with the name of the argument before any work is done."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from .autocast import is_autocast
from .dispatch import in_debug_mode

STRIDED = torch.strided
LARGEST = 2**63 - 1  # signed 64-bit integer


def check_tensor(name: str, value: object) -> None:
    """Raise unless `value` is a strided tensor."""
    if not isinstance(value, Tensor) or value.layout is not STRIDED:
        raise _no_tensor(name, value)


def check_rank(name: str, tensor: Tensor, layout: str) -> None:
    """Raise unless `tensor` is a strided tensor with as many dimensions as `layout`, such as `[B, K, D]`."""
    if not isinstance(tensor, Tensor) or tensor.layout is not STRIDED:
        raise _no_tensor(name, tensor)
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {layout}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless `tensor` is a strided tensor of the expected shape."""
    if not isinstance(tensor, Tensor) or tensor.layout is not STRIDED:
        raise _no_tensor(name, tensor)
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a tensor of floating point numbers."""
    if not isinstance(tensor, Tensor):
        raise _no_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected a floating point type")


def check_real(name: str, tensor: Tensor) -> None:
    """Raise if `tensor` holds complex numbers."""
    if tensor.is_complex():
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected a floating point, integer or bool type")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype, source: str = "") -> None:
    """Raise unless `tensor` has the given dtype; `source` is appended to the message, such as " as in weight"."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}{source}")


def check_like(name: str, tensor: Tensor, dtype: torch.dtype, source: str) -> None:
    """Raise unless `tensor` has the dtype of `source`, or autocast converts both to the same dtype."""
    both = tensor.dtype, dtype
    if dtype != tensor.dtype and (not is_autocast(tensor) or torch.float64 in both):
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype} as in {source}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_vector(name: str, tensor: Tensor, size: int, device: torch.device) -> None:
    """Raise unless `tensor` is a floating point tensor of shape `[size]` on `device`."""
    check_shape(name, tensor, (size,))
    if tensor.device != device:
        check_device(name, tensor, device)
    if not tensor.is_floating_point():
        check_floating(name, tensor)


def check_ids(name: str, ids: Tensor, tokens: int) -> None:
    """Raise unless `ids` is int64 and within 0..tokens-1; values are only checked on the CPU and in debug mode."""
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {ids.dtype}, expected torch.int64")
    if torch.compiler.is_compiling() or ids.is_meta or ids.numel() == 0:
        return
    if type(ids) is Tensor and (ids.device.type == "cpu" or in_debug_mode()):
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= tokens:
            raise ValueError(f"{name} contains {low if low < 0 else high}, expected token numbers 0..{tokens - 1}")


def is_readable(tensor: Tensor) -> bool:
    """Return whether Python may read the values: they exist, and no compiler, tracer or dispatch mode is active."""
    return not (
        torch.compiler.is_compiling()
        or tensor.is_meta
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def check_whole(name: str, value: Any, least: int = 0, most: int = LARGEST) -> int:
    """Return `value` as an int, or raise unless it is an integer in `least..most` and not a bool.

    NumPy integers are accepted, and so are the symbolic sizes of a compiler or tracer.
    """
    whole = value if type(value) is int else _whole(value)
    # A symbolic size is not compared with the upper bound: torch.compile would add a guard.
    if whole is None or whole < least or (not torch.compiler.is_compiling() and whole > most):
        raise ValueError(f"{name} is {described(value)}, expected a whole number {least}..{most}")
    return whole


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if value is not True and value is not False:
        raise ValueError(f"{name} is {described(value)}, expected True or False")


def check_epsilon(name: str, value: Any) -> float:
    """Return `value` as a float, or raise unless it is a finite number >= 0 and not a bool."""
    if type(value) is not float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = float(value)  # from an int or a NumPy number
    if type(value) is not float or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {described(value)}, expected a finite number >= 0")
    return value


def described(value: object) -> str:
    """Return a description of a value for an error message: its repr for a number or string, else its type."""
    if value is None or isinstance(value, (str, numbers.Number)):
        return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    if isinstance(value, Tensor):
        return f"a {value.dtype} Tensor of shape {list(value.shape)}"
    kind = type(value)
    name = f"numpy.{kind.__name__}" if kind.__module__ == "numpy" else kind.__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def _whole(value: Any) -> Any:
    """Return `value` as an integer, or None if it is not one."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, torch.SymInt):
        return value
    # The tracer of torch.jit holds sizes as tensors.
    is_traced = isinstance(value, Tensor) and torch._C._get_tracing_state() is not None
    return value if is_traced and value.dim() == 0 and value.dtype == torch.int64 else None


def _no_tensor(name: str, value: object) -> ValueError:
    if isinstance(value, Tensor):
        return ValueError(f"{name} has layout {value.layout}, expected torch.strided; {name}.to_dense() converts it")
    hint = ""
    if described(value) == "a numpy.ndarray":
        hint = "; torch.from_numpy converts it"
    elif isinstance(value, (list, tuple, bool, int, float)):
        hint = "; torch.tensor converts it"
    return ValueError(f"{name} is {described(value)}, expected a Tensor{hint}")

"""Dtypes under automatic mixed precision, and the copies of weights in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import TypeAlias

import torch
from torch import Tensor

from .dispatch import current_backend, native_refuses, native_unavailable, triton_refuses, triton_unavailable
from .gpu import executors

PLAIN = (Tensor, torch.nn.Parameter)
ALIGNMENT = 64  # elements between the beginnings of two copies: 128 bytes in half precision, for aligned loads

# By the id of a weight: the weight, so that no other gets its id, and its copy.
Copies: TypeAlias = Mapping[int, tuple[Tensor, Tensor]]

is_any_autocast = torch._C._is_any_autocast_enabled  # whether for any device: an answer without the device's name

_copies: ContextVar[Copies | None] = ContextVar("copies", default=None)  # those in use in this thread


def is_autocast(tensor: Tensor) -> bool:
    """Return whether autocast is enabled for the tensor's device."""
    return is_any_autocast() and autocast_dtype(tensor.device.type) is not None


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return autocast's dtype for a device type, or None if it is disabled there; it never is enabled for `meta`."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product with `weight`: autocast's if it is enabled and `weight` is not float64."""
    dtype = autocast_dtype(weight.device.type) if is_any_autocast() else None
    return weight.dtype if dtype is None or weight.dtype == torch.float64 else dtype


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in `dtype`: its copy by `cast_once` if there is one, else a new one.

    For use inside autograd functions, which return the gradient with respect to the weight itself, in its own dtype.
    """
    if weight.dtype == dtype:
        return weight
    copy = copy_of(weight)
    return weight.to(dtype) if copy is None or copy.dtype != dtype else copy


def for_backward(weight: Tensor, used: Tensor) -> Tensor:
    """Return what to save of a weight for backward, where `cast_again` takes it: itself on CPUs, else what was used.

    The copies in half precision then live no longer than the forward pass. On a GPU the casts would be more launches.
    """
    return weight if weight.is_cpu and executors.current() is None else used


def cast_again(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return in `dtype` what `for_backward` returned."""
    return weight if weight.dtype == dtype else weight.to(dtype)


def copy_of(weight: Tensor) -> Tensor | None:
    """Return the copy that `cast_once` made of a weight, or None."""
    if torch.compiler.is_compiling():
        return None
    copies = _copies.get()
    found = None if copies is None else copies.get(id(weight))
    if found is None or found[1].shape != weight.shape:  # a wrapper that shards weights may have gathered it since
        return None
    return found[1]


def current_copies() -> Copies | None:
    """Return the copies that `cast` uses now, for `use_copies`."""
    return None if torch.compiler.is_compiling() else _copies.get()


@contextlib.contextmanager
def use_copies(copies: Copies | None) -> Iterator[None]:
    """Let `cast` use these copies within the `with` block, in which their weights must not change."""
    token = _copies.set(copies)
    try:
        yield
    finally:
        _copies.reset(token)


def cast_once(weights: Iterable[Tensor | None]) -> Copies:
    """Cast weights to autocast's dtype in one go, for `use_copies`: in a few launches instead of one for each weight.

    The ops cast those that are left out: weights that are not plain tensors, contiguous, and of the device and dtype of
    the first one (as the shards of a distributed wrapper), and all weights where the ops' kernels don't run.

    Args:
        weights: parameters; None is skipped.

    Returns:
        The copies. They don't follow a weight that changes.
    """
    kept: list[Tensor] = []
    starts: list[int] = []
    end = 0
    dtype: torch.dtype | None = None
    for weight in weights:
        if weight is None or type(weight) not in PLAIN or not weight.is_contiguous():
            continue
        if not kept:
            dtype = matmul_dtype(weight)
            if weight.dtype == dtype or _kernels_refuse(weight, dtype):
                return {}
        elif weight.dtype != kept[0].dtype or weight.device != kept[0].device:
            continue
        kept.append(weight)
        starts.append(end)
        end += -(-weight.numel() // ALIGNMENT) * ALIGNMENT
    if not kept:
        return {}
    with torch.no_grad():
        memory = torch.empty(end, dtype=dtype, device=kept[0].device)
        made = [memory.as_strided(w.shape, w.stride(), start) for w, start in zip(kept, starts, strict=True)]
        torch._foreach_copy_(made, kept)
    return {id(weight): (weight, copy) for weight, copy in zip(kept, made, strict=True)}


def _kernels_refuse(weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether no kernels of this package would compute with a product of this weight in `dtype`."""
    backend = current_backend()
    if backend in ("auto", "triton") and (triton_unavailable() or triton_refuses([("weight", weight)])) is None:
        return False
    if backend not in ("auto", "native") or native_unavailable() is not None:
        return True
    return native_refuses([("weight", weight.new_empty(0, dtype=dtype))]) is not None

"""Checks of arguments that several ops share; each raises before any work and names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import in_debug_mode


def check_rank(name: str, tensor: Tensor, layout: str) -> None:
    """Raise unless `tensor` has as many dimensions as `layout` names, as in `[B, K, D]`."""
    expected = layout.count(",") + 1
    if tensor.dim() != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected is {layout}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless `tensor` has the expected shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected is {list(expected)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` holds floating point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected is a floating point type")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise unless `tensor` lies on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name} lies on {tensor.device}, expected is {device}")


def check_vector(name: str, tensor: Tensor, size: int, device: torch.device) -> None:
    """Raise unless `tensor` holds `size` floating point numbers in one axis on `device`."""
    check_shape(name, tensor, (size,))
    check_device(name, tensor, device)
    check_floating(name, tensor)


def check_ids(name: str, ids: Tensor, tokens: int) -> None:
    """Raise unless `ids` is int64 and, on CPU and in debug mode, within 0..tokens-1."""
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {ids.dtype}, expected is torch.int64")
    if torch.compiler.is_compiling() or ids.is_meta or ids.numel() == 0:
        return
    if type(ids) is Tensor and (ids.device.type == "cpu" or in_debug_mode()):
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= tokens:
            raise ValueError(f"{name} has a token number {low if low < 0 else high}, allowed is 0..{tokens - 1}")

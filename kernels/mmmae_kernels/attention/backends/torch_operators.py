"""Helpers of the adapters to the operators behind PyTorch's scaled_dot_product_attention.

These return log-sum-exps and take them in backward. Tensors are `[B, h, N, d]`, any strides with a contiguous last
axis. The operators are internal: tests compare their signatures with those that the adapters were written for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import Reason, constant_when_compiled
from ..call import Call
from .flash import Triple, aligned_rows

AMD = ("gfx90a", "gfx942", "gfx950")  # on which PyTorch's kernels are not experimental


def operator(name: str) -> Any:
    """Return an operator of PyTorch by its name."""
    return getattr(torch.ops.aten, name).default


@constant_when_compiled
def missing(*names: str) -> Reason:
    """Return None if this PyTorch has the operators, else the reason."""
    for name in names:
        if not hasattr(torch.ops.aten, name):
            return f"PyTorch {torch.__version__} has no operator {name}"
    return None


@constant_when_compiled
def gpu_missing(*names: str) -> Reason:
    """Return None if there is a GPU and this PyTorch has the operators, else the reason."""
    return missing(*names) if torch.cuda.is_available() else "there is no GPU that torch can use"


def gpu_refuses(call: Call) -> Reason:
    """Return None if PyTorch's flash and memory-efficient kernels run on the GPU of a call, else the reason."""
    if call.target in AMD or (call.capability is not None and (8, 0) <= call.capability <= (12, 1)):
        return None
    return f"its kernels are for compute capability 8.0 to 12.1 and for {', '.join(AMD)}, not {call.target}"


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """Return tensors `[B, N, h, d]` as views `[B, h, N, d]`, copied before where their rows are not aligned."""
    return [aligned_rows(tensor).transpose(1, 2) for tensor in tensors]


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    """Return tensors `[B, h, N, d]` as views `[B, N, h, d]`."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def random_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return a seed and an offset of dropout, which backward takes but does not use without dropout."""
    return q.new_empty((), dtype=torch.int64), q.new_empty((), dtype=torch.int64)

"""Linear layers: by the library that multiplies faster on this CPU, and what the memory-lean ones have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .autocast import is_autocast
from .checks import check_device, check_floating, check_rank, check_vector
from .dispatch import current_backend

CPUINFO = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, forward and backward, by `product` where it is not the eager backend that is asked.

    Args:
        x: `[..., H]`.
        weight, bias: `[D, H]` and `[D]` or None.

    Returns:
        `[..., D]`.
    """
    if current_backend() == "eager" or is_autocast(x) or not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` by oneDNN where that is the faster library; it has no gradient there.

    `weight` may be a transposed view, which is not copied.
    """
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        by_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return by_x, *linear_gradients(grad, x, ctx.needs_input_grad[1:])


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Not in what is compiled: Inductor takes weights of oneDNN for constants, and chooses libraries itself."""
    is_served = x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    return ONEDNN_IS_FASTER and is_served and not torch.compiler.is_compiling()


def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL, which is behind `torch.mm`: on AMD processors with AVX-512.

    MKL keeps its best code for Intel's. On Zen 4 oneDNN reaches 1.05 to 1.2 times its speed, see docs/performance.md.
    """
    has = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has:
        return False
    vendor = re.search(r"vendor_id\s*: (\w+)", CPUINFO.read_text()) if CPUINFO.exists() else None
    is_amd = vendor is not None and vendor[1] == "AuthenticAMD"
    return is_amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


# At import, not at the first call, which torch.compile may trace.
ONEDNN_IS_FASTER = onednn_is_faster()


def check_linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless `weight [D, H]` and `bias [D]` are a linear layer for `x [..., H]`, called `name`."""
    check_floating(name, x)
    check_rank("weight", weight, "[D, H]")
    check_floating("weight", weight)
    check_device("weight", weight, x.device)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected is [..., {weight.shape[1]}] as in weight")
    if x.dtype != weight.dtype and not is_autocast(x):
        raise ValueError(f"weight has dtype {weight.dtype}, expected is {x.dtype} as in {name}")
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], x.device)


def linear_gradients(grad: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by weight and bias of a linear layer of `x [..., H]`, given that of its output `[..., D]`."""
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
    by_weight = _weight_gradient(rows, x.reshape(-1, x.shape[-1])) if needs[0] else None
    return by_weight, rows.sum(0) if needs[1] else None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`[D, H]` of rows `[R, D]` and `[R, H]`. oneDNN copies the transpose of the first, which pays for few columns."""
    return product(grad.t(), x.t()) if grad.shape[1] < x.shape[1] else grad.t() @ x

"""Linear layers: by the library that multiplies faster on this CPU, and what the memory-lean ones have in common."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .autocast import is_autocast, matmul_dtype
from .checks import check_device, check_floating, check_like, check_rank, check_tensor, check_vector
from .cpu import library
from .dispatch import Reason, current_backend
from .operators import fast_apply, first_derivative_only

CPUINFO = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(x, weight, bias)`, forward and backward, by the faster library where `eager` is not asked for.

    Args:
        x: `[..., H]`.
        weight, bias: `[D, H]` and `[D]` or None.

    Returns:
        `[..., D]`.

    Raises:
        ValueError: shapes, types or devices do not fit.
    """
    check_linear("x", x, weight, bias)
    if not uses_onednn(x, weight) or current_backend() == "eager" or is_autocast(x):
        return F.linear(x, weight, bias)
    out: Tensor = _apply(x, weight, bias)
    return out


def linear_no_grad(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(x, weight, bias)` by oneDNN where that is the faster library; it has no gradient there.

    `weight` may be a transposed view, which is not copied.
    """
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(x, weight, bias)`, float32, by oneDNN, without a gradient."""
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()  # the operator takes its elements for neighbours
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_no_grad(x, weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = linear_no_grad(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, *linear_gradients(grad, x, ctx.needs_input_grad[1:])


_apply = fast_apply(_Linear)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN multiplies these, and does it right and faster than MKL.

    Not in what is compiled: Inductor takes weights of oneDNN for constants, and chooses libraries itself.
    """
    return (
        ONEDNN_IS_FASTER
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and _gets_all_threads(torch.get_num_threads())
    )


@functools.cache
def _gets_all_threads(threads: int) -> bool:
    """Return whether OpenMP gives as many threads as torch asks for.

    OneDNN shares its work out among the threads that it was promised. Where OpenMP gives fewer (OMP_THREAD_LIMIT,
    OMP_DYNAMIC), some of the work is left undone and the result is garbage.
    """
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("1", "true"):
        return threads == 1  # what it gives differs from call to call
    compiled = library.module()
    if compiled is not None:
        return bool(compiled.team_size(threads) == threads)
    limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    return not limit.isdigit() or int(limit) >= threads


def onednn_is_faster() -> bool:
    """Return whether oneDNN multiplies float32 faster than MKL, which is behind `torch.mm`: on AMD with AVX-512.

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


def refuse_native_product(weight: Tensor) -> Reason:
    """Return None if a product with `weight` is one of float32, which native kernels go with, else the reason."""
    dtype = matmul_dtype(weight)
    return None if dtype == torch.float32 else f"the product is in {dtype}, native kernels take torch.float32"


def check_linear(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
    names: tuple[str, str] = ("weight", "bias"),
) -> None:
    """Raise ValueError unless `weight [D, H]` and `bias [D]`, called `names`, are a linear layer for `x [..., H]`.

    Its input is called `name` and has the type of `x`, or `dtype`.
    """
    check_tensor(name, x)
    check_floating(name, x)
    check_rank(names[0], weight, "[D, H]")
    check_floating(names[0], weight)
    check_device(names[0], weight, x.device)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected [..., {weight.shape[1]}] as in {names[0]}")
    dtype = x.dtype if dtype is None else dtype
    if weight.dtype != dtype:
        check_like(names[0], weight, dtype, name)
    if bias is not None:
        check_vector(names[1], bias, weight.shape[0], x.device)
        if bias.dtype != weight.dtype:
            check_like(names[1], bias, weight.dtype, names[0])


def linear_gradients(grad: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias of a linear layer of `x [..., H]`, given its output's `[..., D]`."""
    rows = _as_rows(grad)
    grad_weight = matmuls_for(rows, x).weight_gradient(rows, _as_rows(x)) if needs[0] else None
    return grad_weight, rows.sum(0) if needs[1] else None


class Matmuls(NamedTuple):
    """Who multiplies the matrices of a layer; rows are `[R, H]` before it and `[R, D]` behind it, its weight `[D, H]`.

    Args:
        linear: takes `[..., H]`, weight and perhaps bias, and returns `[..., D]`.
        input_gradient: takes `[R, D]` and the weight, and returns `[R, H]`.
        weight_gradient: takes `[R, D]` and `[R, H]`, and returns `[D, H]`.
    """

    linear: Callable[..., Tensor]
    input_gradient: Callable[[Tensor, Tensor], Tensor]
    weight_gradient: Callable[[Tensor, Tensor], Tensor]


def matmuls_for(x: Tensor, weight: Tensor) -> Matmuls:
    """Return who multiplies tensors of the types and devices of `x` and `weight`."""
    is_served = x.is_cpu and x.dtype == weight.dtype == torch.float32
    return _FASTER if ONEDNN_IS_FASTER and is_served and not torch.compiler.is_compiling() else _TORCH


def _faster_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Copy the transpose of `grad`, as oneDNN does, where there are few columns for that to cost less than it gains."""
    return linear_no_grad(grad.t(), x.t()) if grad.shape[1] < x.shape[1] else torch.mm(grad.t(), x)


_TORCH = Matmuls(F.linear, torch.mm, lambda grad, x: torch.mm(grad.t(), x))
# Each asks anew whether oneDNN does it right: that depends on threads and on there being elements.
_FASTER = Matmuls(linear_no_grad, lambda grad, weight: linear_no_grad(grad, weight.t()), _faster_weight_gradient)


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]

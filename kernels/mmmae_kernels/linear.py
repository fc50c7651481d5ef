"""Linear layers by the fastest matrix product on this CPU, and helpers of the ops that contain one."""

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

from .autocast import cast, cast_again, copy_of, for_backward, is_autocast, matmul_dtype
from .checks import check_device, check_floating, check_like, check_rank, check_tensor, check_vector
from .cpu import library
from .dispatch import HALVES, KERNEL_DTYPES, current_backend
from .operators import fast_apply, first_derivative_only, needs_operators

CPUINFO = Path("/proc/cpuinfo")

_sum_of_rows = library.function("sum_of_rows")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(x, weight, bias)`, forward and backward, by oneDNN where that is faster.

    Under autocast it uses the copies made by `cast_once`.

    Args:
        x: `[..., H]`.
        weight, bias: `[D, H]` and `[D]` or None.

    Returns:
        `[..., D]`.

    Raises:
        ValueError: shapes, types or devices do not fit.
    """
    check_linear("x", x, weight, bias)
    is_faster = copy_of(weight) is not None if is_autocast(x) else uses_onednn(x, weight)
    if not is_faster or current_backend() == "eager":
        return F.linear(x, weight, bias)
    out: Tensor = _apply(x, weight, bias, matmul_dtype(weight))
    return out


def linear_no_grad(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(x, weight, bias)` by oneDNN where that is faster; for use inside autograd functions.

    `weight` may be a transposed view, which is not copied.
    """
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(x, weight, bias)` in float32 by oneDNN; autograd does not record it."""
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()  # the operator ignores its stride
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.x_dtype, ctx.matmuls = x.dtype, matmuls_for(x, dtype, weight.dtype)
        x, used = x if x.dtype == dtype else x.to(dtype), cast(weight, dtype)
        ctx.save_for_backward(x, for_backward(weight, used))
        return linear_no_grad(x, used, None if bias is None else cast(bias, dtype))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = linear_no_grad(grad, cast_again(weight, x.dtype).t()).to(ctx.x_dtype)
        return grad_x, *linear_gradients(grad, x, ctx.needs_input_grad[1:], ctx.matmuls), None


_apply = fast_apply(_Linear)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN can be used for this product, computes it correctly and is faster than MKL.

    Always False under `torch.compile`: Inductor chooses the library itself, and takes the weight of oneDNN's operator
    for a constant.
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
    """Return whether OpenMP provides as many threads as torch asks for.

    oneDNN divides its work among the threads that it asked for. If OpenMP provides fewer (OMP_THREAD_LIMIT,
    OMP_DYNAMIC), part of the work is not done and the result is wrong.
    """
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("1", "true"):
        return threads == 1  # the number differs from call to call
    compiled = library.module()
    if compiled is not None:
        return bool(compiled.team_size(threads) == threads)
    limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    return not limit.isdigit() or int(limit) >= threads


def onednn_is_faster() -> bool:
    """Return whether oneDNN multiplies float32 matrices faster than MKL (used by `torch.mm`): on AMD with AVX-512.

    MKL runs its best code on Intel processors only. On Zen 4 oneDNN is 1.05 to 1.2 times as fast, see
    docs/performance.md.
    """
    has = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has:
        return False
    vendor = re.search(r"vendor_id\s*: (\w+)", CPUINFO.read_text()) if CPUINFO.exists() else None
    is_amd = vendor is not None and vendor[1] == "AuthenticAMD"
    return is_amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


# At import, because torch.compile may trace the first call.
ONEDNN_IS_FASTER = onednn_is_faster()


def check_linear(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
    names: tuple[str, str] = ("weight", "bias"),
) -> None:
    """Raise ValueError unless `weight [D, H]` and `bias [D]` form a linear layer for `x [..., H]`.

    Args:
        name: name of the input in messages.
        dtype: dtype of the layer's input; None means that of `x`.
        names: names of weight and bias in messages.
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


def linear_gradients(
    grad: Tensor, x: Tensor, needs: Sequence[bool], matmuls: Matmuls
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients with respect to weight and bias of a linear layer.

    Args:
        grad: gradient with respect to the output, `[..., D]`.
        x: input of the layer, `[..., H]`.
        needs: which of the two gradients to compute; the other one is None.
        matmuls: products of the layer, for the dtype of its parameters.
    """
    rows = _as_rows(grad)
    grad_weight = matmuls.weight_gradient(rows, _as_rows(x)) if needs[0] else None
    return grad_weight, sum_rows(rows, matmuls.dtype) if needs[1] else None


def sum_rows(rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the sum of `rows [R, D]` in `dtype`, or for None in theirs; for use inside autograd functions.

    On a CPU PyTorch would convert all rows to `dtype` first, in memory.
    """
    is_converted = dtype == torch.float32 and rows.dtype in HALVES and rows.dim() == 2
    if not is_converted or not rows.is_cpu or needs_operators(rows) or library.unavailable_reason() is not None:
        return rows.sum(-2, dtype=dtype)
    rows = library.contiguous_rows(rows)
    out = rows.new_empty(rows.shape[1], dtype=torch.float32)
    _sum_of_rows(
        rows.data_ptr(),
        (0, rows.stride(0)),
        out.data_ptr(),
        library.DTYPES[rows.dtype],
        (1, rows.shape[0], rows.shape[1]),
        torch.get_num_threads(),
    )
    return out


class Matmuls(NamedTuple):
    """The three matrix products of a linear layer with weight `[D, H]`.

    Args:
        linear: takes the input `[..., H]`, the weight and optionally a bias, and returns `[..., D]`.
        input_gradient: takes the output's gradient `[R, D]` and the weight, and returns `[R, H]`.
        weight_gradient: takes the output's gradient `[R, D]` and the input `[R, H]`, and returns `[D, H]`.
        dtype: dtype of the weight's gradient; None for that of the factors.
    """

    linear: Callable[..., Tensor]
    input_gradient: Callable[[Tensor, Tensor], Tensor]
    weight_gradient: Callable[[Tensor, Tensor], Tensor]
    dtype: torch.dtype | None = None


def matmuls_for(x: Tensor, dtype: torch.dtype, weight_dtype: torch.dtype) -> Matmuls:
    """Return the fastest matrix products of a linear layer.

    Args:
        x: a tensor on the device of the layer.
        dtype: dtype of the factors.
        weight_dtype: dtype of the parameter, and so of its gradient. Under autocast it differs from `dtype`.
    """
    if dtype != weight_dtype:
        # Only NVIDIA's library writes float32 products of half-precision matrices, and TunableOp refuses them.
        is_nvidia = x.is_cuda and torch.version.hip is None
        writes_float32 = is_nvidia and not torch.compiler.is_compiling() and not _tunes_products()
        if writes_float32 and weight_dtype == torch.float32:
            return INTO_FLOAT32
        return (_CASTING if x.is_cuda or torch.compiler.is_compiling() else _CASTING_ON_CPU)[weight_dtype]
    is_supported = x.is_cpu and dtype == torch.float32
    return _FASTER if ONEDNN_IS_FASTER and is_supported and not torch.compiler.is_compiling() else _TORCH


def _tunes_products() -> bool:
    """Return whether TunableOp chooses the matrix products on GPUs."""
    is_enabled = getattr(torch._C, "_cuda_tunableop_is_enabled", None)  # which only builds for GPUs have
    return is_enabled is not None and bool(is_enabled())


def _faster_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return the weight's gradient by oneDNN if `grad`, whose transpose it copies, is narrow, else by MKL."""
    return linear_no_grad(grad.t(), x.t()) if grad.shape[1] < x.shape[1] else torch.mm(grad.t(), x)


def _half_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return the weight's gradient in half precision; `grad` is transposed by a copy first if it is narrower than `x`.

    oneDNN transposes it too, but not as fast: with 512 by 2048 channels, cast included, the copy makes it 1.3 times as
    fast on a Xeon with AMX, and with 2048 by 512 channels 0.7 times.
    """
    transposed = grad.t()
    return torch.mm(transposed.contiguous() if grad.shape[1] < x.shape[1] else transposed, x)


def _casting(dtype: torch.dtype, weight_gradient: Callable[[Tensor, Tensor], Tensor]) -> Matmuls:
    return Matmuls(F.linear, torch.mm, lambda grad, x: weight_gradient(grad, x).to(dtype), dtype)


_TORCH = Matmuls(F.linear, torch.mm, lambda grad, x: torch.mm(grad.t(), x))
# Each call checks again whether oneDNN can be used: that depends on the number of threads and of elements.
_FASTER = Matmuls(linear_no_grad, lambda grad, weight: linear_no_grad(grad, weight.t()), _faster_weight_gradient)
# All products of half-precision matrices are summed in float32. This one returns the sum; the others round it to half
# precision and cast it, in a pass of its own over the gradient.
INTO_FLOAT32 = Matmuls(
    F.linear, torch.mm, lambda grad, x: torch.mm(grad.t(), x, out_dtype=torch.float32), torch.float32
)
_CASTING = {dtype: _casting(dtype, lambda grad, x: torch.mm(grad.t(), x)) for dtype in KERNEL_DTYPES}
_CASTING_ON_CPU = {dtype: _casting(dtype, _half_weight_gradient) for dtype in KERNEL_DTYPES}


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]

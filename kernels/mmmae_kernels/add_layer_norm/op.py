"""Residual add and layer norm: the two lines between any two sublayers of a pre-norm transformer."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autocast import is_autocast
from ..checks import check_device, check_floating, check_shape, check_vector
from ..dispatch import kernels, native_refuses, native_unavailable, triton_refuses, triton_unavailable
from .reference import add_layer_norm_reference

LONGEST_ROW = 4096  # channels that a program holds on a GPU: 8 a thread of each of eight rows; more would spill


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float = 1e-6,
    residual_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`total = x + residual + residual_bias` and `layer_norm(total) * weight + bias`.

    Args:
        x: `[..., D]`.
        residual: of the same shape, or None for no addition.
        weight, bias: `[D]`.
        epsilon: added to the variance; 1e-6 as in ViT and MAE.
        residual_bias: `[D]`, of the linear layer that gave `residual` without it; None for zero.

    Returns:
        The sum (`x` itself without residual) and the norm, both `[..., D]`. The sum has the type that `x` and
        `residual` are promoted to; the norm has the sum's, and float32 under autocast.

    Raises:
        ValueError: shapes or devices do not fit, a tensor holds no floating point numbers, or there is a
            `residual_bias` and no residual.
    """
    check_norm(x, residual, weight, bias, residual_bias)
    arguments = (x, residual, weight, bias, epsilon, residual_bias)
    total, norm = dispatch.choose("add_layer_norm", *arguments)(*arguments)
    return total, norm


def check_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, residual_bias: Tensor | None = None
) -> None:
    """Raise ValueError unless the arguments of `add_layer_norm` fit each other."""
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape [], expected is [..., D]")
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        check_device("residual", residual, x.device)
        check_floating("residual", residual)
    elif residual_bias is not None:
        raise ValueError("residual_bias is given without a residual")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual_bias", residual_bias)):
        if tensor is not None:
            check_vector(name, tensor, x.shape[-1], x.device)


def _fused(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    residual_bias: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if is_autocast(x) else total_dtype(x, residual)
    total, norm, _, _ = add_layer_norm_forward(x, residual, residual_bias, weight, bias, epsilon, dtype, backend)
    return (x if residual is None else total), norm


def total_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The type of the sum."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


@torch.library.custom_op("mmmae::add_layer_norm", mutates_args=())
def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum (of no elements without residual), norm in `dtype`, mean and 1 / standard deviation `[ROWS]` in float32."""
    forward = kernels("add_layer_norm", backend).add_layer_norm_forward
    result: tuple[Tensor, Tensor, Tensor, Tensor] = forward(x, residual, residual_bias, weight, bias, epsilon, dtype)
    return result


@add_layer_norm_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, rows = x.shape, math.prod(x.shape[:-1])
    total = x.new_empty((0,) if residual is None else shape, dtype=total_dtype(x, residual))
    statistics = [x.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    return total, x.new_empty(shape, dtype=dtype), statistics[0], statistics[1]


@torch.library.custom_op("mmmae::add_layer_norm_backward", mutates_args=())
def add_layer_norm_backward(
    grad_total: Tensor | None,
    grad_norm: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    sum_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by sum, weight and bias, the first's sum over rows in `sum_dtype`, and the norm again.

    The sum over rows has no elements where that type is None, the norm none without `bias`; it has its gradient's type.
    """
    backward = kernels("add_layer_norm", backend).add_layer_norm_backward
    arguments = (grad_total, grad_norm, total, weight, bias, mean, rstd, sum_dtype)
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = backward(*arguments)
    return result


@add_layer_norm_backward.register_fake
def _(
    grad_total: Tensor | None,
    grad_norm: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    sum_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    by_weight, by_bias = (weight.new_empty(weight.shape) for _ in range(2))
    row_sum = total.new_empty(0) if sum_dtype is None else total.new_empty(weight.shape, dtype=sum_dtype)
    norm = total.new_empty((0,) if bias is None else total.shape, dtype=grad_norm.dtype)
    return total.new_empty(total.shape), by_weight, by_bias, row_sum, norm


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, residual_bias, weight, _, _, _, ctx.backend = inputs
    total, _, mean, rstd = output
    ctx.dtypes = dtypes_of(x, residual, residual_bias)
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_total: Tensor | None, grad_norm: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, weight, mean, rstd = ctx.saved_tensors
    grad_total = None if ctx.dtypes[1] is None else grad_total  # without residual there was no sum
    grad, grad_weight, grad_bias, row_sum = grad_total, None, None, None
    if grad_norm is not None:
        grad, grad_weight, grad_bias, row_sum, _ = add_layer_norm_backward(
            grad_total, grad_norm, total, weight, None, mean, rstd, ctx.dtypes[2], ctx.backend
        )
    return *summand_gradients(grad, row_sum, ctx.dtypes), grad_weight, grad_bias, None, None, None


Dtypes = tuple[torch.dtype | None, ...]


def dtypes_of(*summands: Tensor | None) -> Dtypes:
    """Types of x, residual and residual_bias, None for what is not there."""
    return tuple(None if summand is None else summand.dtype for summand in summands)


def summand_gradients(grad: Tensor | None, row_sum: Tensor | None, dtypes: Dtypes) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual and residual_bias of these types, given the sum's and perhaps its sum over rows."""
    if grad is None:
        return None, None, None
    if row_sum is None and dtypes[2] is not None:  # nobody asked for the norm
        row_sum = grad.reshape(-1, grad.shape[-1]).sum(0)
    summands = (grad, grad, row_sum)
    return tuple(None if dtype is None or t is None else t.to(dtype) for t, dtype in zip(summands, dtypes, strict=True))


add_layer_norm_forward.register_autograd(_backward, setup_context=_keep)


def native_runs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float = 1e-6,
    residual_bias: Tensor | None = None,
) -> dispatch.Reason:
    """None if the native kernels take these arguments, else the reason."""
    return native_refuses(_named(x, residual, weight, bias, residual_bias))


def triton_runs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float = 1e-6,
    residual_bias: Tensor | None = None,
) -> dispatch.Reason:
    """None if the Triton kernels take these arguments, else the reason."""
    if x.shape[-1] > LONGEST_ROW:
        return f"x has {x.shape[-1]} channels, a program holds at most {LONGEST_ROW}"
    return triton_refuses(_named(x, residual, weight, bias, residual_bias))


def _named(*tensors: Tensor | None) -> Iterable[tuple[str, Tensor | None]]:
    return zip(("x", "residual", "weight", "bias", "residual_bias"), tensors, strict=True)


dispatch.register(
    "add_layer_norm",
    triton=dispatch.Implementation(functools.partial(_fused, backend="triton"), triton_runs, triton_unavailable),
    native=dispatch.Implementation(functools.partial(_fused, backend="native"), native_runs, native_unavailable),
    eager=dispatch.Implementation(add_layer_norm_reference),
)

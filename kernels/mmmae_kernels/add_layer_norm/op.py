"""Residual add and layer norm: the two lines between any two sublayers of a pre-norm transformer."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..autocast import is_autocast
from ..checks import check_device, check_floating, check_shape
from ..serving import kernels, native_refuses, native_unavailable, triton_refuses, triton_unavailable
from .reference import add_layer_norm_reference

LONGEST_ROW = 4096  # channels that a program holds on a GPU: 8 a thread of each of eight rows; more would spill


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`total = x + residual` and `layer_norm(total) * weight + bias`.

    Args:
        x: `[..., D]`.
        residual: of the same shape, or None for no addition.
        weight, bias: `[D]`.
        epsilon: added to the variance; 1e-6 as in ViT and MAE.

    Returns:
        The sum (`x` itself without residual) and the norm, both `[..., D]`. The norm has the sum's type, and float32
        under autocast.

    Raises:
        ValueError: shapes or devices do not fit, or a tensor holds no floating point numbers.
    """
    check_norm(x, residual, weight, bias)
    function = registry.choose("add_layer_norm", x, residual, weight, bias, epsilon)
    total, norm = function(x, residual, weight, bias, epsilon)
    return total, norm


def check_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError unless the arguments of `add_layer_norm` fit each other."""
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape [], expected is [..., D]")
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        check_device("residual", residual, x.device)
        check_floating("residual", residual)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_shape(name, tensor, (x.shape[-1],))
        check_device(name, tensor, x.device)
        check_floating(name, tensor)


def _fused(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if is_autocast(x) else total_dtype(x, residual)
    total, norm, _, _ = add_layer_norm_forward(x, residual, weight, bias, epsilon, dtype, backend)
    return (x if residual is None else total), norm


def total_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The type of the sum."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


@torch.library.custom_op("mmmae::add_layer_norm", mutates_args=())
def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum (of no elements without residual), norm in `dtype`, mean and 1 / standard deviation `[ROWS]` in float32."""
    forward = kernels("add_layer_norm", backend).add_layer_norm_forward
    result: tuple[Tensor, Tensor, Tensor, Tensor] = forward(x, residual, weight, bias, epsilon, dtype)
    return result


@add_layer_norm_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by sum, weight and bias, and the norm again in its gradient's type, of no elements without `bias`."""
    backward = kernels("add_layer_norm", backend).add_layer_norm_backward
    result: tuple[Tensor, Tensor, Tensor, Tensor] = backward(grad_total, grad_norm, total, weight, bias, mean, rstd)
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = total.new_empty((0,) if bias is None else total.shape, dtype=grad_norm.dtype)
    return total.new_empty(total.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape), norm


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, _, _, ctx.backend = inputs
    total, _, mean, rstd = output
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_total: Tensor | None, grad_norm: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, weight, mean, rstd = ctx.saved_tensors
    grad_total = None if ctx.dtypes[1] is None else grad_total  # without residual there was no sum
    grad, grad_weight, grad_bias = grad_total, None, None
    if grad_norm is not None:
        grad, grad_weight, grad_bias, _ = add_layer_norm_backward(
            grad_total, grad_norm, total, weight, None, mean, rstd, ctx.backend
        )
    grads = [None if grad is None or dtype is None else grad.to(dtype) for dtype in ctx.dtypes]
    return *grads, grad_weight, grad_bias, None, None, None


add_layer_norm_forward.register_autograd(_backward, setup_context=_keep)


def native_runs(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *rest: object) -> registry.Reason:
    """None if the native kernels take these arguments, else the reason."""
    return native_refuses((("x", x), ("residual", residual), ("weight", weight), ("bias", bias)))


def triton_runs(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *rest: object) -> registry.Reason:
    """None if the Triton kernels take these arguments, else the reason."""
    if x.shape[-1] > LONGEST_ROW:
        return f"x has {x.shape[-1]} channels, a program holds at most {LONGEST_ROW}"
    return triton_refuses((("x", x), ("residual", residual), ("weight", weight), ("bias", bias)))


registry.register(
    "add_layer_norm",
    triton=registry.Implementation(functools.partial(_fused, backend="triton"), triton_runs, triton_unavailable),
    native=registry.Implementation(functools.partial(_fused, backend="native"), native_runs, native_unavailable),
    eager=registry.Implementation(add_layer_norm_reference),
)

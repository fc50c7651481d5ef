"""Residual add and layer norm: the two lines between any two sublayers of a pre-norm transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autocast import is_autocast
from ..checks import check_device, check_epsilon, check_floating, check_like, check_shape, check_tensor, check_vector
from ..dispatch import Arguments, Reason, declare, native_refuses, tensors_of, triton_refuses
from ..operators import declare_operator, fast_apply, first_derivative_only, kernels_for
from .reference import add_layer_norm_reference

LONGEST_ROW = 4096  # channels that a program holds on a GPU: 8 a thread of each of eight rows; more would spill

Dtypes = tuple[torch.dtype | None, ...]

HALVES = (torch.float16, torch.bfloat16)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float = 1e-6,
    residual_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `total = x + residual + residual_bias` and `layer_norm(total) * weight + bias`.

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
    epsilon = check_epsilon("epsilon", epsilon)
    arguments = (x, residual, weight, bias, epsilon, residual_bias)
    total, norm = ADD_LAYER_NORM.select(dispatch_key(x, residual, weight, bias, residual_bias), *arguments)(*arguments)
    return total, norm


def check_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual_bias: Tensor | None = None,
    names: tuple[str, str] = ("weight", "bias"),
) -> None:
    """Raise ValueError unless the arguments of `add_layer_norm` fit each other; `names` are those of its parameters."""
    check_tensor("x", x)
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape [], expected [..., D]")
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        check_device("residual", residual, x.device)
        check_floating("residual", residual)
    elif residual_bias is not None:
        raise ValueError("residual_bias is given without a residual")
    width, device = x.shape[-1], x.device
    check_vector(names[0], weight, width, device)
    check_vector(names[1], bias, width, device)
    if residual_bias is not None:
        check_vector("residual_bias", residual_bias, width, device)
    dtype = total_dtype(x, residual)
    if weight.dtype != dtype and (weight.dtype != torch.float32 or dtype not in HALVES):
        check_like(names[0], weight, dtype, "x" if residual is None else "x + residual")
    if bias.dtype != weight.dtype:
        check_like(names[1], bias, weight.dtype, names[0])


def dispatch_key(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Return what backends look at of a row-wise op on one device: device, width, and the types."""
    return x.device, x.shape[-1], x.dtype, *[None if other is None else other.dtype for other in others]


def _by_kernels(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, residual_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if is_autocast(x) else total_dtype(x, residual)
        results = _apply(x, residual, residual_bias, weight, bias, epsilon, dtype, backend)
        return (x, results) if residual is None else results

    return run


def total_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """Return the type of the sum."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


class _AddLayerNorm(torch.autograd.Function):
    """Gives sum and norm, or the norm alone where there is nothing to add."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *call, backend = arguments
        x, residual, residual_bias, weight, *_ = call
        total, norm, mean, rstd = kernels_for(x, backend).add_layer_norm_forward(*call)
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.backend = dtypes_of(x, residual, residual_bias), backend
        return norm if residual is None else (total, norm)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_total, grad_norm = grads if len(grads) == 2 else (None, grads[0])
        grad, grad_weight, grad_bias, row_sum = grad_total, None, None, None
        if grad_norm is not None:
            total, weight, mean, rstd = ctx.saved_tensors
            backward = kernels_for(total, ctx.backend).add_layer_norm_backward
            grad, grad_weight, grad_bias, row_sum, _ = backward(
                grad_total, grad_norm, total, weight, None, mean, rstd, ctx.dtypes[2]
            )
        return *summand_gradients(grad, row_sum, ctx.dtypes), grad_weight, grad_bias, None, None, None


_apply = fast_apply(_AddLayerNorm)


def dtypes_of(*summands: Tensor | None) -> Dtypes:
    """Return types, None for what is not there."""
    return tuple([None if summand is None else summand.dtype for summand in summands])


def summand_gradients(grad: Tensor | None, row_sum: Tensor | None, dtypes: Dtypes) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, residual and residual_bias of these types, given the sum's and its sum over rows."""
    if grad is None:
        return None, None, None
    x, residual, residual_bias = dtypes
    if residual_bias is not None and row_sum is None:  # nobody asked for the norm
        row_sum = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (
        grad if x is None else in_dtype(grad, x),
        None if residual is None else in_dtype(grad, residual),
        None if residual_bias is None or row_sum is None else in_dtype(row_sum, residual_bias),
    )


def in_dtype(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient in the type of what it is of."""
    return grad if grad.dtype == dtype else grad.to(dtype)


def _forward_fake(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = rest[-1]
    rows = math.prod(x.shape[:-1])
    total = x.new_empty((0,) if residual is None else x.shape, dtype=total_dtype(x, residual))
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return total, x.new_empty(x.shape, dtype=dtype), mean, rstd


# Sum (of no elements without residual), norm in `dtype`, mean and 1 / standard deviation `[ROWS]` in float32.
declare_operator(
    "add_layer_norm",
    "add_layer_norm_forward(Tensor x, Tensor? residual, Tensor? residual_bias, Tensor weight, Tensor bias, "
    "float epsilon, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    name="add_layer_norm",
)


def _backward_fake(
    grad_total: object, grad_norm: Tensor, total: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sum_dtype = rest[-1]
    row_sum = total.new_empty(0) if sum_dtype is None else total.new_empty(weight.shape, dtype=sum_dtype)
    norm = total.new_empty((0,) if bias is None else total.shape, dtype=grad_norm.dtype)
    grad_weight, grad_bias = (weight.new_empty(weight.shape) for _ in range(2))
    return total.new_empty(total.shape), grad_weight, grad_bias, row_sum, norm


# Gradients with respect to sum, weight and bias, the first's sum over rows in `sum_dtype` (of no elements where that is
# None), and the norm again, in its gradient's type (of no elements without `bias`).
declare_operator(
    "add_layer_norm",
    "add_layer_norm_backward(Tensor? grad_total, Tensor grad_norm, Tensor total, Tensor weight, Tensor? bias, "
    "Tensor mean, Tensor rstd, ScalarType? sum_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


def refuse_long_rows(arguments: Arguments) -> Reason:
    """Return None if a program on a GPU can hold a row of `x`, else the reason."""
    width = arguments["x"].shape[-1]
    return f"x has {width} channels, a program holds at most {LONGEST_ROW}" if width > LONGEST_ROW else None


def _triton_refuses(arguments: Arguments) -> Reason:
    return refuse_long_rows(arguments) or triton_refuses(tensors_of(arguments))


ADD_LAYER_NORM = declare(
    "add_layer_norm",
    add_layer_norm_reference,
    _by_kernels,
    native_refuses=lambda arguments: native_refuses(tensors_of(arguments)),
    triton_refuses=_triton_refuses,
)

"""Residual add and layer norm, the two operations between the sublayers of a pre-norm transformer."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..autocast import is_autocast, matmul_dtype
from ..checks import check_device, check_epsilon, check_floating, check_like, check_shape, check_tensor, check_vector
from ..dispatch import HALVES, Arguments, Reason, declare, native_refuses, tensors_of, triton_refuses
from ..gpu.groups import COUNTERS
from ..operators import declare_operator, fast_apply, first_derivative_only, kernels_for
from .reference import add_layer_norm_reference

LONGEST_ROW = 4096  # channels: a GPU thread holds 8 of each of eight rows in backward, more would spill registers

Dtypes = tuple[torch.dtype | None, ...]


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
        residual: `[..., D]`, or None for no addition.
        weight, bias: `[D]`.
        epsilon: added to the variance; 1e-6 as in ViT and MAE.
        residual_bias: `[D]`, the bias of the linear layer that computed `residual` without it; None for zero.

    Returns:
        The sum (`x` itself without residual) and the norm, both `[..., D]`. The sum has the dtype that `x` and
        `residual` promote to; the norm has the same dtype, or float32 under autocast.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or `residual_bias` is given without `residual`.

    Example:
        >>> x, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> total, norm = add_layer_norm(x, residual, torch.ones(8), torch.zeros(8))
        >>> torch.equal(total, x + residual)
        True
    """
    epsilon = check_epsilon("epsilon", epsilon)
    arguments = (x, residual, weight, bias, epsilon, residual_bias)
    total, norm = ADD_LAYER_NORM.select_checked(_key, _check, *arguments)(*arguments)
    return total, norm


def _key(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, residual_bias: Tensor | None
) -> Hashable:
    return summands_key(x, residual, residual_bias), matmul_dtype(weight), tensor_key(weight), tensor_key(bias)


tensor_key = operator.attrgetter("shape", "dtype", "device", "layout")


def summands_key(x: Tensor, residual: Tensor | None, residual_bias: Tensor | None) -> Hashable:
    """Return what checks and the choice of an implementation depend on in the summands of a norm."""
    shape = x.shape
    return (
        *(shape[-1], x.dtype, x.device, x.layout),
        None if residual is None else (residual.shape == shape, residual.dtype, residual.device, residual.layout),
        None if residual_bias is None else tensor_key(residual_bias),
    )


def _check(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, residual_bias: Tensor | None
) -> None:
    check_norm(x, residual, weight, bias, residual_bias)


def check_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual_bias: Tensor | None = None,
    names: tuple[str, str] = ("weight", "bias"),
) -> None:
    """Raise ValueError unless the arguments of `add_layer_norm` match; `names` are those of weight and bias."""
    check_tensor("x", x)
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape [], expected [..., D]")
    if residual is not None:
        check_shape("residual", residual, x.shape)
        check_device("residual", residual, x.device)
        check_floating("residual", residual)
    elif residual_bias is not None:
        raise ValueError("residual_bias is given without residual, expected both or neither")
    width, device = x.size(-1), x.device
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
    """Return the dispatch key of a row-wise op: device, width and dtypes."""
    return x.device, x.size(-1), x.dtype, *[None if other is None else other.dtype for other in others]


def _by_kernels(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, residual_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if is_autocast(x) else total_dtype(x, residual)
        results = _apply(x, residual, residual_bias, weight, bias, epsilon, dtype, backend)
        return (x, results) if residual is None else results

    return run


def total_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """Return the dtype of `x + residual`."""
    dtype = x.dtype
    if residual is None or residual.dtype == dtype:
        return dtype
    return torch.promote_types(dtype, residual.dtype)


class AddLayerNorm(torch.autograd.Function):
    """Returns sum and norm, or only the norm if there is no residual to add."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *call, backend = arguments
        x, residual, residual_bias, weight, *_ = call
        total, norm, statistics, counters = kernels_for(x, backend).add_layer_norm_forward(*call)
        ctx.save_for_backward(x if residual is None else total, weight, statistics, counters)
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.backend = dtypes_of(x, residual, residual_bias), backend
        return norm if residual is None else (total, norm)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_total, grad_norm = grads if len(grads) == 2 else (None, grads[0])
        grad, grad_weight, grad_bias, row_sum, grad_residual = grad_total, None, None, None, None
        if grad_norm is not None:
            total, weight, statistics, counters = ctx.saved_tensors
            backward = kernels_for(total, ctx.backend).add_layer_norm_backward
            grad, grad_weight, grad_bias, row_sum, _, grad_residual = backward(
                *(grad_total, grad_norm, total, weight, None, statistics, counters), ctx.dtypes[2], ctx.dtypes[1]
            )
        return *summand_gradients(grad, row_sum, ctx.dtypes, grad_residual), grad_weight, grad_bias, None, None, None


_apply = fast_apply(AddLayerNorm)


def dtypes_of(*summands: Tensor | None) -> Dtypes:
    """Return the dtypes of tensors, None for a missing one."""
    return tuple([None if summand is None else summand.dtype for summand in summands])


def summand_gradients(
    grad: Tensor | None, row_sum: Tensor | None, dtypes: Dtypes, grad_residual: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, residual and residual_bias.

    Args:
        grad: gradient of the sum; None for zero.
        row_sum: `grad` summed over rows; None to compute it here if needed.
        dtypes: dtypes of the three; None for a missing one.
        grad_residual: `grad` in the dtype of the residual, if the kernel wrote it in two dtypes.
    """
    if grad is None:
        return None, None, None
    x, residual, residual_bias = dtypes
    if residual_bias is not None and row_sum is None:  # the norm is not used, so its kernel did not run
        row_sum = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (
        grad if x is None else in_dtype(grad, x),
        None if residual is None else residual_gradient(grad, grad_residual, residual),
        None if residual_bias is None or row_sum is None else in_dtype(row_sum, residual_bias),
    )


def residual_gradient(grad: Tensor, grad_residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the residual, given that of the sum, and its own if the kernel wrote it."""
    return in_dtype(grad, dtype) if grad.dtype == dtype or grad_residual is None else grad_residual


def in_dtype(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient in the given dtype."""
    return grad if grad.dtype == dtype else grad.to(dtype)


def _forward_fake(
    x: Tensor, residual: Tensor | None, residual_bias: object, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, dtype, backend = rest
    rows = math.prod(x.shape[:-1])
    total = x.new_empty((0,) if residual is None else x.shape, dtype=total_dtype(x, residual))
    statistics = x.new_empty(2, rows, dtype=torch.float32)
    counters = x.new_zeros(weight.shape[:-1].numel() * COUNTERS if backend == "triton" else 0, dtype=torch.int32)
    return total, x.new_empty(x.shape, dtype=dtype), statistics, counters


# Returns the sum (empty without residual), the norm in `dtype`, in float32 mean and 1 / standard deviation `[2, ROWS]`,
# and zeros, which a GPU's backward kernel counts with and leaves as they were (see gpu/partial_sums.py; else empty).
# On a GPU weight and biases may be stacks `[W, D]`, each for one of W equal parts of the rows.
declare_operator(
    "add_layer_norm",
    "add_layer_norm_forward(Tensor x, Tensor? residual, Tensor? residual_bias, Tensor weight, Tensor bias, "
    "float epsilon, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    name="add_layer_norm",
    fake_needs_backend=True,
)


def _backward_fake(
    grad_total: object, grad_norm: Tensor, total: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, sum_dtype, residual_dtype = rest
    row_sum = total.new_empty(0) if sum_dtype is None else total.new_empty(weight.shape, dtype=sum_dtype)
    norm = total.new_empty((0,) if bias is None else total.shape, dtype=grad_norm.dtype)
    grad_weight, grad_bias = (weight.new_empty(weight.shape) for _ in range(2))
    is_same = residual_dtype is None or residual_dtype == total.dtype
    grad_residual = total.new_empty((0,) if is_same else total.shape, dtype=None if is_same else residual_dtype)
    return total.new_empty(total.shape), grad_weight, grad_bias, row_sum, norm, grad_residual


# Returns the gradients of x, weight, bias and residual_bias (in `sum_dtype`; empty if that is None), the norm computed
# again, in the dtype of its gradient (empty without `bias`), and the gradient of residual (that of x in
# `residual_dtype`; empty if that is None or the dtype of x's gradient, which then is both).
declare_operator(
    "add_layer_norm",
    "add_layer_norm_backward(Tensor? grad_total, Tensor grad_norm, Tensor total, Tensor weight, Tensor? bias, "
    "Tensor statistics, Tensor? counters, ScalarType? sum_dtype, ScalarType? residual_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


def refuse_long_rows(arguments: Arguments) -> Reason:
    """Return None if the GPU kernels support rows as long as those of `x`, else the reason."""
    width = arguments["x"].shape[-1]
    return f"x has {width} channels, Triton kernels take at most {LONGEST_ROW}" if width > LONGEST_ROW else None


def _triton_refuses(arguments: Arguments) -> Reason:
    return refuse_long_rows(arguments) or triton_refuses(tensors_of(arguments))


ADD_LAYER_NORM = declare(
    "add_layer_norm",
    add_layer_norm_reference,
    _by_kernels,
    native_refuses=lambda arguments: native_refuses(tensors_of(arguments)),
    triton_refuses=_triton_refuses,
)

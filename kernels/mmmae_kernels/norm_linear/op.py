"""Residual add, layer norm and a linear layer; only the sum is saved, backward computes the norm again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..add_layer_norm.op import (
    check_norm,
    dtypes_of,
    refuse_long_rows,
    summand_gradients,
    summands_key,
    tensor_key,
    total_dtype,
)
from ..autocast import cast, cast_again, for_backward, matmul_dtype
from ..checks import check_epsilon
from ..dispatch import Arguments, Reason, declare, native_refuses, tensors_of, triton_refuses
from ..linear import check_linear, linear_gradients, linear_no_grad, matmuls_for
from ..operators import fast_apply, first_derivative_only, kernels_for
from .reference import norm_linear_reference


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float = 1e-6,
    residual_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `total = x + residual + residual_bias` and `F.linear(layer_norm(total), weight, bias)`.

    The layer norm is not saved for backward, which computes it again.

    Args:
        x: `[..., H]`.
        residual: `[..., H]`, or None for no addition.
        norm_weight, norm_bias: `[H]`, parameters of the layer norm.
        weight, bias: `[D, H]` and `[D]` or None, parameters of the linear layer.
        epsilon: added to the variance; 1e-6 as in ViT and MAE.
        residual_bias: `[H]`, the bias of the linear layer that computed `residual` without it; None for zero.

    Returns:
        The sum `[..., H]` (`x` itself without residual), and the output of the linear layer `[..., D]`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or `residual_bias` is given without `residual`.

    Example:
        >>> x, weight = torch.randn(2, 5, 8), torch.randn(24, 8)
        >>> total, qkv = norm_linear(x, x, torch.ones(8), torch.zeros(8), weight, None)
        >>> total.shape, qkv.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 24]))
    """
    epsilon = check_epsilon("epsilon", epsilon)
    arguments = (x, residual, norm_weight, norm_bias, weight, bias, epsilon, residual_bias)
    total, out = NORM_LINEAR.select_checked(_key, _check, *arguments)(*arguments)
    return total, out


def _key(x: Tensor, residual: Tensor | None, *others: Any) -> Hashable:
    norm_weight, norm_bias, weight, bias, _, residual_bias = others
    return (
        *(summands_key(x, residual, residual_bias), matmul_dtype(weight)),
        *(
            tensor_key(norm_weight),
            tensor_key(norm_bias),
            tensor_key(weight),
            None if bias is None else tensor_key(bias),
        ),
    )


def _check(x: Tensor, residual: Tensor | None, *others: Any) -> None:
    norm_weight, norm_bias, weight, bias, _, residual_bias = others
    check_norm(x, residual, norm_weight, norm_bias, residual_bias, ("norm_weight", "norm_bias"))
    check_linear("x", x, weight, bias, total_dtype(x, residual))


def _by_kernels(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, residual: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
        norm_weight, norm_bias, weight, bias, epsilon, residual_bias = arguments
        dtype = matmul_dtype(weight)
        results = _apply(x, residual, residual_bias, norm_weight, norm_bias, weight, bias, epsilon, dtype, backend)
        return (x, results) if residual is None else results

    return run


class _NormLinear(torch.autograd.Function):
    """Returns the sum and the output of the linear layer, or only the output if there is no residual to add."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        residual_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
        dtype: torch.dtype,
        backend: str,
    ) -> Any:
        forward = kernels_for(x, backend).add_layer_norm_forward
        total, norm, statistics, counters = forward(x, residual, residual_bias, norm_weight, norm_bias, epsilon, dtype)
        ctx.dtypes, ctx.backend = dtypes_of(x, residual, residual_bias), backend
        ctx.matmuls = matmuls_for(x, dtype, weight.dtype)
        saved = weight
        if weight.dtype != dtype:
            weight, bias = cast(weight, dtype), None if bias is None else cast(bias, dtype)
            saved = for_backward(saved, weight)
        ctx.save_for_backward(x if residual is None else total, statistics, counters, norm_weight, norm_bias, saved)
        ctx.set_materialize_grads(False)
        out = linear_no_grad(norm, weight, bias)
        return out if residual is None else (total, out)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_total, grad_out = grads if len(grads) == 2 else (None, grads[0])
        dtypes = ctx.dtypes
        if grad_out is None:
            return *summand_gradients(grad_total, None, dtypes), *(None,) * 7
        total, statistics, counters, norm_weight, norm_bias, weight = ctx.saved_tensors
        backward = kernels_for(total, ctx.backend).add_layer_norm_backward
        grad_norm = linear_no_grad(grad_out, cast_again(weight, grad_out.dtype).t())
        grad, grad_norm_weight, grad_norm_bias, row_sum, norm, grad_residual = backward(
            *(grad_total, grad_norm, total, norm_weight, norm_bias, statistics, counters), dtypes[2], dtypes[1]
        )
        grad_weight, grad_bias = linear_gradients(grad_out, norm, ctx.needs_input_grad[5:7], ctx.matmuls)
        summands = summand_gradients(grad, row_sum, dtypes, grad_residual)
        return *summands, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, None, None, None


_apply = fast_apply(_NormLinear)


def _native_refuses(arguments: Arguments) -> Reason:
    return native_refuses(tensors_of(arguments))


def _triton_refuses(arguments: Arguments) -> Reason:
    return refuse_long_rows(arguments) or triton_refuses(tensors_of(arguments))


NORM_LINEAR = declare(
    "norm_linear",
    norm_linear_reference,
    _by_kernels,
    native_refuses=_native_refuses,
    triton_refuses=_triton_refuses,
)

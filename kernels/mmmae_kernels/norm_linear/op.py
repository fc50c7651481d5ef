"""Residual add, layer norm and a linear layer, which keeps the sum alone and computes its norm again in backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..add_layer_norm import op as add_layer_norm
from ..autocast import matmul_dtype
from ..dispatch import native_refuses, native_unavailable, triton_refuses, triton_unavailable
from ..linear import check_linear, linear_gradients, product
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
    """`total = x + residual + residual_bias` and `F.linear(layer_norm(total), weight, bias)`; no norm is kept.

    Args:
        x: `[..., H]`.
        residual: of the same shape, or None for no addition.
        norm_weight, norm_bias: `[H]`, of the layer norm.
        weight, bias: `[D, H]` and `[D]` or None, of the linear layer.
        epsilon: added to the variance; 1e-6 as in ViT and MAE.
        residual_bias: `[H]`, of the linear layer that gave `residual` without it; None for zero.

    Returns:
        The sum (`x` itself without residual) `[..., H]`, and the linear layer's output `[..., D]`.

    Raises:
        ValueError: shapes or devices do not fit, a tensor holds no floating point numbers, or there is a
            `residual_bias` and no residual.
    """
    add_layer_norm.check_norm(x, residual, norm_weight, norm_bias, residual_bias)
    check_linear("x", x, weight, bias)
    arguments = (x, residual, norm_weight, norm_bias, weight, bias, epsilon, residual_bias)
    total, out = dispatch.choose("norm_linear", *arguments)(*arguments)
    return total, out


class _NormLinear(torch.autograd.Function):
    """The sum has no elements without residual; the last two outputs are the norm's statistics."""

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        residual_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total, norm, mean, rstd = add_layer_norm.add_layer_norm_forward(
            x, residual, residual_bias, norm_weight, norm_bias, epsilon, weight.dtype, backend
        )
        return total, product(norm, weight, bias), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, residual_bias, norm_weight, norm_bias, weight, _, _, ctx.backend = inputs
        total, _, mean, rstd = output
        ctx.dtypes = add_layer_norm.dtypes_of(x, residual, residual_bias)
        ctx.save_for_backward(x if residual is None else total, mean, rstd, norm_weight, norm_bias, weight)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_total, grad_out = grads[:2]
        grad_total = None if ctx.dtypes[1] is None else grad_total  # without residual there was no sum
        total, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        by_norm: tuple[Tensor | None, Tensor | None] = (None, None)
        by_linear: tuple[Tensor | None, Tensor | None] = (None, None)
        grad, row_sum = grad_total, None
        if grad_out is not None:
            grad_norm = product(grad_out, weight.t())
            grad, grad_weight, grad_bias, row_sum, norm = add_layer_norm.add_layer_norm_backward(
                grad_total, grad_norm, total, norm_weight, norm_bias, mean, rstd, ctx.dtypes[2], ctx.backend
            )
            by_norm = grad_weight, grad_bias
            by_linear = linear_gradients(grad_out, norm, ctx.needs_input_grad[5:7])
        by_summands = add_layer_norm.summand_gradients(grad, row_sum, ctx.dtypes)
        return *by_summands, *by_norm, *by_linear, None, None


def _lean(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    residual_bias: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = matmul_dtype(weight)
    bias = None if bias is None else bias.to(dtype)
    total, out, _, _ = _NormLinear.apply(  # type: ignore[no-untyped-call]
        x, residual, residual_bias, norm_weight, norm_bias, weight.to(dtype), bias, epsilon, backend
    )
    return (x if residual is None else total), out


def _native_runs(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float = 1e-6,
    residual_bias: Tensor | None = None,
) -> dispatch.Reason:
    if matmul_dtype(weight) != torch.float32:
        return f"the product is in {matmul_dtype(weight)}, native kernels take torch.float32"
    norm = add_layer_norm.native_runs(x, residual, norm_weight, norm_bias, epsilon, residual_bias)
    return norm or native_refuses((("weight", weight), ("bias", bias)))


def _triton_runs(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float = 1e-6,
    residual_bias: Tensor | None = None,
) -> dispatch.Reason:
    norm = add_layer_norm.triton_runs(x, residual, norm_weight, norm_bias, epsilon, residual_bias)
    return norm or triton_refuses((("weight", weight), ("bias", bias)))


dispatch.register(
    "norm_linear",
    triton=dispatch.Implementation(functools.partial(_lean, backend="triton"), _triton_runs, triton_unavailable),
    native=dispatch.Implementation(functools.partial(_lean, backend="native"), _native_runs, native_unavailable),
    eager=dispatch.Implementation(norm_linear_reference),
)

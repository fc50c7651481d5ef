"""GELU and the linear layer after it, which keeps what went into the GELU alone and computes the activation again."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..autocast import matmul_dtype
from ..checks import check_vector
from ..dispatch import kernels, native_refuses, native_unavailable, triton_refuses, triton_unavailable
from ..linear import check_linear, linear_gradients, product
from .reference import gelu_linear_reference


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_bias: Tensor | None = None) -> Tensor:
    """`F.linear(F.gelu(hidden + hidden_bias), weight, bias)`, exact GELU, with no activated tensor kept for backward.

    Args:
        hidden: `[..., H]`.
        weight, bias: `[D, H]` and `[D]` or None.
        hidden_bias: `[H]`, of the layer that gave `hidden` without it; None for zero. The sum is never in memory.

    Returns:
        `[..., D]`.

    Raises:
        ValueError: shapes or devices do not fit, or a tensor holds no floating point numbers.
    """
    check_linear("hidden", hidden, weight, bias)
    if hidden_bias is not None:
        check_vector("hidden_bias", hidden_bias, hidden.shape[-1], hidden.device)
    arguments = (hidden, weight, bias, hidden_bias)
    out: Tensor = dispatch.choose("gelu_linear", *arguments)(*arguments)
    return out


@torch.library.custom_op("mmmae::gelu", mutates_args=())
def gelu_forward(hidden: Tensor, hidden_bias: Tensor | None, backend: str) -> Tensor:
    """`gelu(hidden + hidden_bias)`, contiguous, in the type of `hidden`."""
    activated: Tensor = kernels("gelu_linear", backend).gelu_forward(hidden, hidden_bias)
    return activated


@gelu_forward.register_fake
def _(hidden: Tensor, hidden_bias: Tensor | None, backend: str) -> Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("mmmae::gelu_backward", mutates_args={"grad"})
def gelu_backward(grad: Tensor, hidden: Tensor, hidden_bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """Turn `grad`, contiguous, into `grad * gelu'(hidden + hidden_bias)`; give what follows.

    The activation, contiguous, in the type of `hidden`, and the gradient of `hidden_bias` (no elements without).
    """
    backward = kernels("gelu_linear", backend).gelu_backward
    result: tuple[Tensor, Tensor] = backward(grad, hidden, hidden_bias)
    return result


@gelu_backward.register_fake
def _(grad: Tensor, hidden: Tensor, hidden_bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    grad_bias = hidden.new_empty(0) if hidden_bias is None else hidden_bias.new_empty(hidden_bias.shape)
    return hidden.new_empty(hidden.shape), grad_bias


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_bias: Tensor | None, backend: str
    ) -> Tensor:
        return product(gelu_forward(hidden, hidden_bias, backend), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, weight, _, hidden_bias, ctx.backend = inputs
        ctx.save_for_backward(hidden, weight, hidden_bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        hidden, weight, hidden_bias = ctx.saved_tensors
        grad_hidden = product(grad, weight.t())  # by the activation, and then in the same memory by what was activated
        activated, grad_bias = gelu_backward(grad_hidden, hidden, hidden_bias, ctx.backend)
        by_linear = linear_gradients(grad, activated, ctx.needs_input_grad[1:3])
        return grad_hidden, *by_linear, None if hidden_bias is None else grad_bias, None


def _lean(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_bias: Tensor | None = None, *, backend: str
) -> Tensor:
    dtype = matmul_dtype(weight)
    bias = None if bias is None else bias.to(dtype)
    arguments = (hidden.to(dtype), weight.to(dtype), bias, hidden_bias, backend)
    out: Tensor = _GeluLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


def _native_runs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_bias: Tensor | None = None
) -> dispatch.Reason:
    if matmul_dtype(weight) != torch.float32:
        return f"the product is in {matmul_dtype(weight)}, native kernels take torch.float32"
    return native_refuses((("hidden", hidden), ("weight", weight), ("bias", bias), ("hidden_bias", hidden_bias)))


def _triton_runs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_bias: Tensor | None = None
) -> dispatch.Reason:
    return triton_refuses((("hidden", hidden), ("weight", weight), ("bias", bias), ("hidden_bias", hidden_bias)))


dispatch.register(
    "gelu_linear",
    triton=dispatch.Implementation(functools.partial(_lean, backend="triton"), _triton_runs, triton_unavailable),
    native=dispatch.Implementation(functools.partial(_lean, backend="native"), _native_runs, native_unavailable),
    eager=dispatch.Implementation(gelu_linear_reference),
)

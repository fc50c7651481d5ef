"""GELU and the linear layer after it, which keeps what went into the GELU alone and computes the activation again."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import registry
from ..autocast import matmul_dtype
from ..linear import check_linear, linear_gradients
from ..serving import kernels, native_refuses, native_unavailable, triton_refuses, triton_unavailable
from .reference import gelu_linear_reference


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(F.gelu(hidden), weight, bias)`, exact GELU, without an activated tensor kept for backward.

    Args:
        hidden: `[..., H]`.
        weight, bias: `[D, H]` and `[D]` or None.

    Returns:
        `[..., D]`.

    Raises:
        ValueError: shapes or devices do not fit, or a tensor holds no floating point numbers.
    """
    check_linear("hidden", hidden, weight, bias)
    out: Tensor = registry.choose("gelu_linear", hidden, weight, bias)(hidden, weight, bias)
    return out


@torch.library.custom_op("mmmae::gelu_backward", mutates_args=())
def gelu_backward(grad: Tensor, hidden: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """`grad * gelu'(hidden)` and `gelu(hidden)`, contiguous, in the type of `hidden`."""
    grads: tuple[Tensor, Tensor] = kernels("gelu_linear", backend).gelu_backward(grad, hidden)
    return grads


@gelu_backward.register_fake
def _(grad: Tensor, hidden: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return F.linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, weight, _, ctx.backend = inputs
        ctx.save_for_backward(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        hidden, weight = ctx.saved_tensors
        grad_hidden, activated = gelu_backward(grad @ weight, hidden, ctx.backend)
        return grad_hidden, *linear_gradients(grad, activated, ctx.needs_input_grad[1:3]), None


def _lean(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    dtype = matmul_dtype(weight)
    bias = None if bias is None else bias.to(dtype)
    out: Tensor = _GeluLinear.apply(hidden.to(dtype), weight.to(dtype), bias, backend)  # type: ignore[no-untyped-call]
    return out


def _native_runs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> registry.Reason:
    if matmul_dtype(weight) != torch.float32:
        return f"the product is in {matmul_dtype(weight)}, native kernels take torch.float32"
    return native_refuses((("hidden", hidden), ("weight", weight), ("bias", bias)))


def _triton_runs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> registry.Reason:
    return triton_refuses((("hidden", hidden), ("weight", weight), ("bias", bias)))


registry.register(
    "gelu_linear",
    triton=registry.Implementation(functools.partial(_lean, backend="triton"), _triton_runs, triton_unavailable),
    native=registry.Implementation(functools.partial(_lean, backend="native"), _native_runs, native_unavailable),
    eager=registry.Implementation(gelu_linear_reference),
)

"""GELU and a linear layer; only the input of the GELU is saved, backward computes the activation again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..add_layer_norm.op import dispatch_key
from ..autocast import cast, cast_again, for_backward, matmul_dtype
from ..checks import check_vector
from ..dispatch import Arguments, Reason, declare, native_refuses, tensors_of, triton_refuses
from ..gpu.groups import COUNTERS
from ..linear import check_linear, linear_gradients, linear_no_grad, matmuls_for
from ..operators import declare_operator, fast_apply, first_derivative_only, kernels_for
from .reference import gelu_linear_reference

BLOCK_H = 512  # channels of a GPU program


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(F.gelu(hidden + hidden_bias), weight, bias)` with the exact GELU.

    The activation is not saved for backward, which computes it again; `hidden + hidden_bias` is never in memory.

    Args:
        hidden: `[..., H]`.
        weight, bias: `[D, H]` and `[D]` or None.
        hidden_bias: `[H]`, the bias of the linear layer that computed `hidden` without it; None for zero.

    Returns:
        `[..., D]`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.

    Example:
        >>> gelu_linear(torch.randn(2, 5, 16), torch.randn(8, 16), torch.zeros(8)).shape
        torch.Size([2, 5, 8])
    """
    check_linear("hidden", hidden, weight, bias)
    if hidden_bias is not None:
        check_vector("hidden_bias", hidden_bias, hidden.shape[-1], hidden.device)
    arguments = (hidden, weight, bias, hidden_bias)
    key = (*dispatch_key(*arguments), matmul_dtype(weight))
    out: Tensor = GELU_LINEAR.select(key, *arguments)(*arguments)
    return out


def _by_kernels(backend: str) -> Callable[..., Tensor]:
    def run(hidden: Tensor, weight: Tensor, *biases: Tensor | None) -> Tensor:
        dtype = matmul_dtype(weight)
        out: Tensor = _apply(hidden if hidden.dtype == dtype else hidden.to(dtype), weight, *biases, dtype, backend)
        return out

    return run


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden_bias: Tensor | None,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.matmuls, ctx.backend = matmuls_for(hidden, dtype, weight.dtype), backend
        saved = weight
        if weight.dtype != dtype:
            weight, bias = cast(weight, dtype), None if bias is None else cast(bias, dtype)
            saved = for_backward(saved, weight)
        activated, counters = kernels_for(hidden, backend).gelu_forward(hidden, hidden_bias)
        ctx.save_for_backward(hidden, saved, hidden_bias, counters)
        return linear_no_grad(activated, weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, hidden_bias, counters = ctx.saved_tensors
        # First the gradient of the activation; gelu_backward overwrites it with that of hidden.
        grad_hidden = linear_no_grad(grad, cast_again(weight, grad.dtype).t())
        backward = kernels_for(hidden, ctx.backend).gelu_backward
        activated, grad_hidden_bias = backward(grad_hidden, hidden, hidden_bias, counters)
        grad_weight, grad_bias = linear_gradients(grad, activated, ctx.needs_input_grad[1:3], ctx.matmuls)
        return grad_hidden, grad_weight, grad_bias, None if hidden_bias is None else grad_hidden_bias, None, None


_apply = fast_apply(_GeluLinear)


def _forward_fake(hidden: Tensor, hidden_bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    counters = 0
    if hidden_bias is not None and backend == "triton":
        counters = hidden_bias.shape[:-1].numel() * -(-hidden.shape[-1] // BLOCK_H) * COUNTERS
    return hidden.new_empty(hidden.shape), hidden.new_zeros(counters, dtype=torch.int32)


# Returns `gelu(hidden + hidden_bias)`, contiguous, in the dtype of `hidden`, and zeros, which a GPU's backward kernel
# counts with and leaves as they were (see gpu/partial_sums.py; else, and without `hidden_bias`, empty). On a GPU the
# bias may be a stack `[W, H]`, each for one of W equal parts of the rows.
declare_operator(
    "gelu_linear",
    "gelu_forward(Tensor hidden, Tensor? hidden_bias) -> (Tensor, Tensor)",
    _forward_fake,
    name="gelu",
    fake_needs_backend=True,
)


def _backward_fake(grad: Tensor, hidden: Tensor, hidden_bias: Tensor | None, *rest: object) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(0) if hidden_bias is None else torch.empty_like(hidden_bias)


# Multiplies `grad`, contiguous, in place by `gelu'(hidden + hidden_bias)`. Returns the activation, contiguous, in the
# dtype of `hidden`, and the gradient with respect to `hidden_bias` (an empty tensor without).
declare_operator(
    "gelu_linear",
    "gelu_backward(Tensor(a!) grad, Tensor hidden, Tensor? hidden_bias, Tensor? counters) -> (Tensor, Tensor)",
    _backward_fake,
)


def _native_refuses(arguments: Arguments) -> Reason:
    return native_refuses(tensors_of(arguments))


GELU_LINEAR = declare(
    "gelu_linear",
    gelu_linear_reference,
    _by_kernels,
    native_refuses=_native_refuses,
    triton_refuses=lambda arguments: triton_refuses(tensors_of(arguments)),
)

"""Conditioning of tokens on vectors as one autograd function: norm, attention by concatenation, and projection."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dispatch
from ..add_layer_norm.op import in_dtype, residual_gradient
from ..add_layer_norm.reference import add_layer_norm_reference
from ..attention.op import attention_backend, concat_attention
from ..attention.reference import attention_eager
from ..autocast import autocast_dtype, cast, cast_again, for_backward
from ..gpu import executors
from ..linear import linear, sum_rows
from ..norm_linear.op import norm_linear
from ..operators import fast_apply, first_derivative_only, kernels_for
from .plan import Plan, make_plan, native_refuses, triton_refuses

Results = tuple[Tensor, Tensor]


class ConditioningWeights(NamedTuple):
    """The parameters of a conditioning step of width D."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    qkv_weight: Tensor  # [3*D, D]
    qkv_bias: Tensor  # [3*D]
    proj_weight: Tensor  # [D, D]
    proj_bias: Tensor  # [D]


def conditioning_reference(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    vectors: Tensor,
    present: Tensor,
    weights: ConditioningWeights,
    heads: int,
    epsilon: float,
) -> Results:
    """Define `run_conditioning`: attention from the tokens to the tokens and the present vectors, concatenated."""
    w, (batch, tokens, width) = weights, x.shape
    x, norm = add_layer_norm_reference(x, residual, w.norm_weight, w.norm_bias, epsilon, residual_bias)
    guides = F.layer_norm(vectors, (width,), w.norm_weight, w.norm_bias, epsilon).to(norm.dtype)
    qkv = F.linear(torch.cat([norm, guides], dim=1), w.qkv_weight, w.qkv_bias)
    q, k, v = qkv.view(batch, tokens + vectors.shape[1], 3, heads, width // heads).unbind(2)
    key_present = torch.cat([present.new_ones(batch, tokens), present], dim=1)
    mixed = attention_eager(q[:, :tokens], k, v, key_present)
    return x, F.linear(mixed.flatten(2), w.proj_weight, w.proj_bias)


class ConditioningCall(NamedTuple):
    """The arguments of `conditioning_reference`."""

    x: Tensor  # [B, N, D]
    residual: Tensor | None  # [B, N, D]
    residual_bias: Tensor | None  # [D]
    vectors: Tensor  # [B, m, D]; the contents of absent vectors do not matter
    present: Tensor  # [B, m] bool, which vectors are present
    weights: ConditioningWeights
    heads: int
    epsilon: float


def run_conditioning(call: ConditioningCall, attention: str) -> Results:
    """Compute attention from the tokens `x + residual + residual_bias` to themselves and to the present vectors.

    Args:
        call: the arguments, which are not checked.
        attention: backend of attention, see `mmmae_kernels.attention`.

    Returns:
        The sum `x + residual + residual_bias`, and the update to add to it, both `[B, N, D]`.
    """
    if torch.compiler.is_compiling():
        return _select(call, attention)(call)
    key = _dispatch_key(call, attention)
    function = CONDITIONING.selected.get(key)
    if function is None:
        function = CONDITIONING.selected[key] = _select(call, attention)
    results: Results = function(call)
    return results


_tensor_key = operator.attrgetter("dtype", "device")


def _dispatch_key(call: ConditioningCall, attention: str) -> Hashable:
    x, residual, residual_bias, vectors, _, weights, heads, _ = call
    return (
        *(heads, attention_backend(attention), dispatch.current_backend(), executors.current() is None),
        *(dispatch.native_unavailable() is None, torch.are_deterministic_algorithms_enabled()),
        *(autocast_dtype(x.device.type), x.numel() == 0, x.shape[-1]),
        *(None if tensor is None else _tensor_key(tensor) for tensor in (x, residual, residual_bias, vectors)),
        *map(_tensor_key, weights),
    )


def _select(call: ConditioningCall, attention: str) -> Callable[[ConditioningCall], Results]:
    tensors = (call.x, call.residual, call.residual_bias, call.vectors, *call.weights)
    plan = make_plan(CONDITIONING, call, attention, tensors)
    if plan is None:
        return lambda call: _by_sublayer(call, attention)
    apply = fast_apply(FusedConditioning)

    def run(call: ConditioningCall) -> Results:
        x, residual, residual_bias, vectors, present, weights, *numbers = call
        results = apply(plan, *numbers, present, x, residual, residual_bias, vectors, *weights)
        return (x, results) if residual is None else results

    return run


def _by_sublayer(call: ConditioningCall, backend: str) -> Results:
    x, residual, residual_bias, vectors, present, w, heads, epsilon = call
    width = x.shape[-1]
    x, qkv = norm_linear(x, residual, w.norm_weight, w.norm_bias, w.qkv_weight, w.qkv_bias, epsilon, residual_bias)
    weight, bias = w.qkv_weight[width:], w.qkv_bias[width:]
    _, kv = norm_linear(vectors, None, w.norm_weight, w.norm_bias, weight, bias, epsilon)
    qkv = qkv.view(*qkv.shape[:2], 3, heads, width // heads)
    kv = kv.view(*kv.shape[:2], 2, heads, width // heads)
    mixed = concat_attention(qkv, kv.to(qkv.dtype), present, backend=backend)
    return x, linear(mixed.flatten(2), w.proj_weight, w.proj_bias)


class FusedConditioning(torch.autograd.Function):
    """Returns the sum and the update, or only the update if there is no residual to add."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        heads: int,
        epsilon: float,
        present: Tensor,
        *stream_and_weights: Any,
    ) -> Any:
        x, residual, residual_bias, vectors, *weights = stream_and_weights
        w = ConditioningWeights(*weights)
        kernels, project, dtype = kernels_for(x, plan.backend), plan.matmuls.linear, plan.dtype
        norms = (w.norm_weight, w.norm_bias, epsilon, dtype)
        qkv_weight, qkv_bias, proj_weight, proj_bias = (cast(weight, dtype) for weight in weights[2:])
        batch, tokens, width = x.shape
        total, norm, statistics, counters = kernels.add_layer_norm_forward(x, residual, residual_bias, *norms)
        _, guide, guide_statistics, guide_counters = kernels.add_layer_norm_forward(vectors, None, None, *norms)
        qkv = project(norm, qkv_weight, qkv_bias).view(batch, tokens, 3, heads, width // heads)
        kv = project(guide, qkv_weight[width:], qkv_bias[width:])
        kv = kv.view(batch, vectors.shape[1], 2, heads, width // heads)
        mixed, lse = kernels.attention_forward([qkv], None, plan.attention)
        lse = kernels.merge_vectors(qkv.select(2, 0), mixed, lse, kv, present)
        ctx.save_for_backward(
            *(present, x if residual is None else total, statistics, counters),
            *(vectors, guide_statistics, guide_counters),
            *(qkv, kv, mixed, lse, w.norm_weight, w.norm_bias),
            *(for_backward(w.qkv_weight, qkv_weight), for_backward(w.proj_weight, proj_weight)),
        )
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        guidance = project(mixed.flatten(2), proj_weight, proj_bias)
        return guidance if residual is None else (total, guidance)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_total, grad_out = grads if len(grads) == 2 else (None, grads[0])
        present, total, statistics, counters, vectors, guide_statistics, guide_counters, *rest = ctx.saved_tensors
        qkv, kv, mixed, lse, *weights = rest
        norm_weight, norm_bias, qkv_weight, proj_weight = weights
        plan, dtypes = ctx.plan, ctx.plan.dtypes
        qkv_weight, proj_weight = (cast_again(weight, plan.dtype) for weight in (qkv_weight, proj_weight))
        *_, qkv_bias_dtype, _, proj_bias_dtype = dtypes
        kernels, matmuls = kernels_for(total, plan.backend), plan.matmuls
        (batch, tokens, width), guides = total.shape, vectors.shape[1]
        rows, guide_rows = batch * tokens, batch * guides

        if grad_out is None:
            grad_out = total.new_zeros(total.shape, dtype=plan.dtype)
        grad_out = grad_out.reshape(rows, width)
        grad_proj_weight = matmuls.weight_gradient(grad_out, mixed.view(rows, width))
        grad_proj_bias = sum_rows(grad_out, proj_bias_dtype)
        grad_mixed = matmuls.input_gradient(grad_out, proj_weight).view(mixed.shape)
        (grad_qkv,) = kernels.attention_backward(grad_mixed, [qkv], None, mixed, lse, plan.attention)
        grad_kv = kernels.merge_vectors_backward(
            grad_mixed, qkv.select(2, 0), mixed, lse, kv, present, grad_qkv.select(2, 0)
        )
        grad_qkv, grad_kv = grad_qkv.view(rows, 3 * width), grad_kv.view(guide_rows, 2 * width)

        def norm_backward(added: Tensor | None, grad: Tensor, inputs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = kernels.add_layer_norm_backward(
                added, grad, inputs, norm_weight, norm_bias, *rest
            )
            return found

        grad, grad_norm_weight, grad_norm_bias, grad_residual_bias, norm, grad_residual = norm_backward(
            None if grad_total is None else grad_total.reshape(rows, width),
            *(matmuls.input_gradient(grad_qkv, qkv_weight), total.reshape(rows, width), statistics, counters),
            *(dtypes[2], dtypes[1]),
        )
        grad_vectors, guide_norm_weight, guide_norm_bias, _, guide, _ = norm_backward(
            *(None, matmuls.input_gradient(grad_kv, qkv_weight[width:]), vectors.reshape(guide_rows, width)),
            *(guide_statistics, guide_counters, None, None),
        )
        # The vectors' part is added in place to the tokens' part.
        grad_qkv_weight = matmuls.weight_gradient(grad_qkv, norm)
        grad_qkv_weight[width:].add_(matmuls.weight_gradient(grad_kv, guide))
        grad_qkv_bias = sum_rows(grad_qkv, qkv_bias_dtype)
        grad_qkv_bias[width:].add_(sum_rows(grad_kv, qkv_bias_dtype))
        if dtypes[1] is not None:
            grad_residual = residual_gradient(grad, grad_residual, dtypes[1]).view(total.shape)
        grad = grad.view(total.shape)
        grad_weights = (
            *(grad_norm_weight.add_(guide_norm_weight), grad_norm_bias.add_(guide_norm_bias), grad_qkv_weight),
            *(grad_qkv_bias, grad_proj_weight, grad_proj_bias),
        )
        return (
            *(None, None, None, None, in_dtype(grad, dtypes[0])),
            None if dtypes[1] is None else grad_residual,
            None if dtypes[2] is None else grad_residual_bias,
            in_dtype(grad_vectors.view(vectors.shape), dtypes[3]),
            *(in_dtype(gradient, dtype) for gradient, dtype in zip(grad_weights, dtypes[4:], strict=True)),
        )


CONDITIONING = dispatch.declare(
    "conditioning",
    conditioning_reference,
    lambda backend: run_conditioning,
    native_refuses=native_refuses,
    triton_refuses=triton_refuses,
)

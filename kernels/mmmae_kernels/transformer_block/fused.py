"""A transformer block as one autograd function: forward and backward call the same kernels on every backend.

It saves the input of each layer norm with its statistics, q, k and v, attention's output with its log-sum-exps, and the
input of the GELU. Norms and the activation are computed again in backward, in the pass that computes their gradients.
On a CPU under autocast the second norm's input is added again too, from the first one's and what attention adds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..add_layer_norm.op import in_dtype, residual_gradient
from ..autocast import cast, cast_again, for_backward
from ..linear import sum_rows
from ..operators import first_derivative_only, kernels_for
from .plan import Plan
from .reference import BlockWeights, take


class Saved(NamedTuple):
    """The tensors saved for backward, except q, k and v.

    Each weight may be a stack with one more axis in front, see `StackedBlocks`.
    """

    ids: Tensor | None  # [B, M]
    total1: Tensor  # [B, N, D], the stream before attention
    statistics1: Tensor  # [2, B*N]
    counters1: Tensor | None  # zeros that backward on a GPU counts with
    mixed: Tensor  # [B, M, h, d], attention's output
    lse: Tensor  # [B, h, M]
    total2: Tensor | None  # [B, M, D], the stream after attention; None if computed again, from the next two
    attended: Tensor | None  # [B, M, D], what attention adds to the stream without the bias
    proj_bias: Tensor | None
    statistics2: Tensor  # [2, B*M]
    counters2: Tensor | None
    hidden: Tensor  # [B, M, H], output of fc1 without its bias
    hidden_counters: Tensor | None
    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    proj_weight: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor


PRODUCTS = ("qkv_weight", "qkv_bias", "proj_weight", "fc1_weight", "fc2_weight")  # weights in the products' dtype

# Indices into (x, residual, residual_bias, *weights).
RESIDUAL, RESIDUAL_BIAS = 1, 2
QKV_WEIGHT, QKV_BIAS, PROJ_WEIGHT, PROJ_BIAS, FC1_WEIGHT, FC2_WEIGHT = (
    3 + BlockWeights._fields.index(name)
    for name in ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "fc1_weight", "fc2_weight")
)


class FusedBlock(torch.autograd.Function):
    """A whole block; takes the plan, then the arguments of `transformer_block` with the weights as single tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        heads: int,
        ids: Tensor | None,
        epsilon: float,
        *stream_and_weights: Any,
    ) -> tuple[Tensor, Tensor]:
        return _forward(ctx, plan, heads, ids, epsilon, *stream_and_weights)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (None, None, None, None, *_backward(ctx, ctx.needs_input_grad[4:], *grads))


class StackedBlocks(torch.autograd.Function):
    """Blocks of W models in one: the first of W equal parts of the samples is for the first block, and so on.

    Takes the weights as stacks `[W, ...]` and computes with these, then `x`, `residual`, and the parameters that are in
    the stacks, which get the gradients: W for the first stack, W for the second, and so on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        heads: int,
        epsilon: float,
        stacks: Sequence[Tensor | None],
        x: Tensor,
        residual: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.counts = [0 if stack is None else stack.shape[0] for stack in stacks]
        return _forward(ctx, plan, heads, None, epsilon, x, residual, *stacks)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = iter(ctx.needs_input_grad[6:])
        stack_needs = [any(list(itertools.islice(needs, count))) for count in ctx.counts]
        grad_x, grad_residual, *grad_stacks = _backward(ctx, (*ctx.needs_input_grad[4:6], *stack_needs), *grads)
        return (None, None, None, None, grad_x, grad_residual, *unstacked(grad_stacks, ctx.counts))


def unstacked(grads: Sequence[Tensor | None], counts: Sequence[int]) -> Iterator[Tensor | None]:
    """Yield the gradients of the parameters in stacks, given those of the stacks and how many parameters each has.

    They are views, which autograd keeps as gradients of parameters without a copy.
    """
    for grad, count in zip(grads, counts, strict=True):
        yield from [None] * count if grad is None or count == 0 else grad.unbind(0)


def _forward(
    ctx: Any, plan: Plan, heads: int, ids: Tensor | None, epsilon: float, *stream_and_weights: Any
) -> tuple[Tensor, Tensor]:
    x, residual, residual_bias, *weights = stream_and_weights
    w = BlockWeights(*weights)
    kernels, project, dtype = kernels_for(x, plan.backend), plan.matmuls.linear, plan.dtype
    factors = tuple([getattr(w, name) for name in PRODUCTS])
    if plan.dtypes[QKV_WEIGHT] != dtype:  # under autocast
        factors = tuple([cast(factor, dtype) for factor in factors])
    qkv_weight, qkv_bias, proj_weight, fc1_weight, fc2_weight = factors
    batch, tokens, width = x.shape
    head = width // heads

    total1, norm1, *saved1 = kernels.add_layer_norm_forward(
        x, residual, residual_bias, w.norm1_weight, w.norm1_bias, epsilon, dtype
    )
    rows = total1 = x if residual is None else total1
    if ids is None:
        projected: tuple[Tensor, ...] = (project(norm1, qkv_weight, qkv_bias).view(batch, tokens, 3, heads, head),)
    else:
        q = project(take(norm1, ids), qkv_weight[:width], qkv_bias[:width]).view(batch, ids.shape[1], heads, head)
        kv = project(norm1, qkv_weight[width:], qkv_bias[width:]).view(batch, tokens, 2, heads, head)
        projected, rows = (q, kv), take(total1, ids)
    del norm1
    mixed, lse = kernels.attention_forward(projected, None, plan.attention)
    attended = project(mixed.flatten(2), proj_weight)
    total2, norm2, *saved2 = kernels.add_layer_norm_forward(
        rows, attended, w.proj_bias, w.norm2_weight, w.norm2_bias, epsilon, dtype
    )
    # What attention adds takes half the bytes of a float32 stream. On a GPU another sum would be another launch.
    adds_again = plan.backend == "native" and attended.itemsize < total2.itemsize
    summed = (None, attended, w.proj_bias) if adds_again else (total2, None, None)
    del attended
    hidden = project(norm2, fc1_weight)
    del norm2
    activated, hidden_counters = kernels.gelu_forward(hidden, w.fc1_bias)
    out = project(activated, fc2_weight)
    del activated

    ctx.save_for_backward(
        *(ids, total1, *saved1, mixed, lse, *summed, *saved2, hidden, hidden_counters),
        *(w.norm1_weight, w.norm1_bias, for_backward(w.qkv_weight, qkv_weight)),
        *(for_backward(w.proj_weight, proj_weight), w.norm2_weight, w.norm2_bias),
        *(for_backward(w.fc1_weight, fc1_weight), w.fc1_bias, for_backward(w.fc2_weight, fc2_weight)),
        *projected,  # after the fields of Saved
    )
    ctx.set_materialize_grads(False)
    ctx.plan = plan
    return total2, out


def _backward(
    ctx: Any, needs: Sequence[bool], grad_total: Tensor | None, grad_out: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `x`, `residual`, `residual_bias` and the weights; of products only those it needs."""
    tensors = ctx.saved_tensors
    saved, projected = Saved(*tensors[: len(Saved._fields)]), tensors[len(Saved._fields) :]
    plan: Plan = ctx.plan
    kernels, matmuls = kernels_for(saved.total1, plan.backend), plan.matmuls
    norm_backward = kernels.add_layer_norm_backward
    dtypes = plan.dtypes
    batch, tokens, width = saved.total1.shape
    rows, all_rows = batch * saved.mixed.shape[1], batch * tokens

    def weight_gradient(index: int, grad: Tensor, inputs: Tensor) -> Tensor | None:
        return in_dtype(matmuls.weight_gradient(grad, inputs), dtypes[index]) if needs[index] else None

    def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
        return matmuls.input_gradient(grad, cast_again(weight, plan.dtype))

    # The MLP.
    if grad_out is None:
        grad_out = saved.mixed.new_zeros(rows, width, dtype=plan.dtype)
    grad_out = grad_out.reshape(rows, width)
    grad_hidden = input_gradient(grad_out, saved.fc2_weight)
    activated, grad_fc1_bias = kernels.gelu_backward(
        grad_hidden, saved.hidden.view(rows, saved.hidden.shape[2]), saved.fc1_bias, saved.hidden_counters
    )
    grad_fc2_weight = weight_gradient(FC2_WEIGHT, grad_out, activated)
    del activated
    grad_stream, grad_norm2_weight, grad_norm2_bias, grad_proj_bias, norm2, grad_attended = norm_backward(
        None if grad_total is None else grad_total.reshape(rows, width),
        input_gradient(grad_hidden, saved.fc1_weight),
        _stream_after_attention(saved).view(rows, width),
        *(saved.norm2_weight, saved.norm2_bias, saved.statistics2, saved.counters2),
        *(dtypes[PROJ_BIAS], plan.dtype),
    )
    grad_fc1_weight = weight_gradient(FC1_WEIGHT, grad_hidden, norm2)
    del grad_hidden, norm2

    # Attention.
    grad_attended = residual_gradient(grad_stream, grad_attended, plan.dtype)
    grad_proj_weight = weight_gradient(PROJ_WEIGHT, grad_attended, saved.mixed.view(rows, width))
    grad_mixed = input_gradient(grad_attended, saved.proj_weight).view(saved.mixed.shape)
    grads = kernels.attention_backward(grad_mixed, projected, None, saved.mixed, saved.lse, plan.attention)
    del grad_attended, grad_mixed
    # Without ids, both are the gradient of the packed q, k and v.
    grad_q = grads[0].view(rows, width if len(grads) == 2 else 3 * width)
    grad_kv = grads[-1].view(all_rows, 2 * width if len(grads) == 2 else 3 * width)
    qkv_weight = cast_again(saved.qkv_weight, plan.dtype)
    if saved.ids is None:
        grad_norm = matmuls.input_gradient(grad_kv, qkv_weight)
    else:
        index = saved.ids[:, :, None].expand(-1, -1, width)
        grad_norm = matmuls.input_gradient(grad_kv, qkv_weight[width:])
        grad_queries = matmuls.input_gradient(grad_q, qkv_weight[:width])
        grad_norm.view(saved.total1.shape).scatter_add_(1, index, grad_queries.view(index.shape))
        grad_rows = grad_stream.view(index.shape)
        all_tokens = saved.total1.new_zeros(saved.total1.shape)  # contiguous, whatever the strides of the stream
        grad_stream = all_tokens.scatter_add_(1, index, grad_rows).view(all_rows, width)
    grad, grad_norm1_weight, grad_norm1_bias, grad_residual_bias, norm1, grad_residual = norm_backward(
        grad_stream,
        grad_norm,
        saved.total1.reshape(all_rows, width),
        *(saved.norm1_weight, saved.norm1_bias, saved.statistics1, saved.counters1),
        *(dtypes[RESIDUAL_BIAS], dtypes[RESIDUAL]),
    )
    grad_qkv_weight, grad_qkv_bias = weight_gradient(QKV_WEIGHT, grad_kv, norm1), None
    if needs[QKV_BIAS]:
        stack = qkv_weight.shape[:-2]  # (W,), or () for one block
        each = all_rows // math.prod(stack)  # -1 would be ambiguous where the width is 0
        grad_qkv_bias = sum_rows(grad_kv.view(*stack, each, grad_kv.shape[1]), dtypes[QKV_BIAS])
    if saved.ids is not None:
        query_weight_gradient = weight_gradient(
            QKV_WEIGHT, grad_q, take(norm1.view(saved.total1.shape), saved.ids).view(rows, width)
        )
        if query_weight_gradient is not None and grad_qkv_weight is not None:
            grad_qkv_weight = torch.cat([query_weight_gradient, grad_qkv_weight])
        if grad_qkv_bias is not None:
            grad_qkv_bias = torch.cat([sum_rows(grad_q, dtypes[QKV_BIAS]), grad_qkv_bias])
    if dtypes[RESIDUAL] is not None:
        grad_residual = residual_gradient(grad, grad_residual, dtypes[RESIDUAL]).view(saved.total1.shape)
    grad = grad.view(saved.total1.shape)
    return (
        in_dtype(grad, dtypes[0]),
        None if dtypes[RESIDUAL] is None else grad_residual,
        None if dtypes[RESIDUAL_BIAS] is None else grad_residual_bias,
        *(grad_norm1_weight, grad_norm1_bias, grad_qkv_weight, grad_qkv_bias, grad_proj_weight, grad_proj_bias),
        *(grad_norm2_weight, grad_norm2_bias, grad_fc1_weight, grad_fc1_bias, grad_fc2_weight),
    )


def _stream_after_attention(saved: Saved) -> Tensor:
    """Return `total2`, where it is not saved with the additions of forward, to the bit."""
    if saved.attended is None or saved.proj_bias is None:
        assert saved.total2 is not None
        return saved.total2
    rows = saved.total1 if saved.ids is None else take(saved.total1, saved.ids)
    return torch.add(saved.attended, saved.proj_bias.to(torch.float32)).add_(rows)

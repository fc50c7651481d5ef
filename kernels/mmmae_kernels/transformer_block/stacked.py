"""Transformer blocks of several models at once, each with its own samples and weights, in the launches of one block.

It pays where a launch costs more than what it computes. The models' weights of a kind are stacked: matrix products are
batched, and the other kernels find the weight of a row in the stack.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..add_layer_norm.op import AddLayerNorm, total_dtype
from ..autocast import ALIGNMENT, PLAIN, is_autocast
from ..linear import INTO_FLOAT32, Matmuls
from ..operators import fast_apply, first_derivative_only
from .fused import PRODUCTS, StackedBlocks, unstacked
from .op import BlockCall, Results, plan_call
from .plan import Plan
from .reference import BlockWeights


class Stack(NamedTuple):
    """Parameters of equal shape, one of each model, and a copy of them side by side."""

    parameters: tuple[Tensor, ...]
    copy: Tensor  # [W, ...], in the dtype that kernels read


class StackedWeights(NamedTuple):
    """The stacks of the parameters of a block, and of the bias of its last layer."""

    block: tuple[Stack, ...]  # in the order of BlockWeights
    last_bias: Stack


def plan_together(calls: Sequence[BlockCall], attention: str) -> Plan | None:
    """Return the plan by which blocks of several models are computed at once, or None if they can't be.

    They can be by Triton's kernels and a flash backend of attention, for all tokens, if they are alike in everything
    but the numbers in their parameters.

    Args:
        calls: a call of each model.
        attention: backend of attention, see `mmmae_kernels.attention`.
    """
    if len(calls) < 2 or torch.compiler.is_compiling():
        return None
    if any(type(weight) not in PLAIN or not weight.is_contiguous() for call in calls for weight in call.weights):
        return None
    plan = plan_call(calls[0], attention)
    if plan is None or plan.backend != "triton" or any(plan_call(call, attention) is not plan for call in calls):
        return None
    return plan


def stack_weights(
    blocks: Sequence[Sequence[tuple[BlockWeights, Tensor]]], others: Sequence[Sequence[Tensor]], dtype: torch.dtype
) -> tuple[list[StackedWeights], list[Stack]]:
    """Copy the weights of several models into stacks, in a few launches for all of them.

    Under autocast the copies of the factors of products are the casts to `dtype` that each model would make anyway. In
    float32 they are 75 MB for three auxiliary encoders of `base`, which an H100 reads and writes in 0.05 ms; the 330
    launches that they save take it 0.3 ms if it pauses for 1 us at each.

    Args:
        blocks: for each block, the weights and the bias of the last layer of each model.
        others: other parameters, of each model one.
        dtype: dtype of matrix products.
    """
    kinds: list[tuple[Tensor, ...]] = []
    dtypes: list[torch.dtype] = []
    for models in blocks:
        of_block = list(zip(*((*weights, last_bias) for weights, last_bias in models), strict=True))
        for field, kind in zip((*BlockWeights._fields, "last_bias"), of_block, strict=True):
            kinds.append(kind)
            dtypes.append(dtype if field in PRODUCTS else kind[0].dtype)
    kinds += map(tuple, others)
    dtypes += [kind[0].dtype for kind in others]
    stacks = iter(_stack(kinds, dtypes))
    count = len(BlockWeights._fields)
    weights = [StackedWeights(tuple(itertools.islice(stacks, count)), next(stacks)) for _ in blocks]
    return weights, list(stacks)


def _stack(kinds: Sequence[tuple[Tensor, ...]], dtypes: Sequence[torch.dtype]) -> list[Stack]:
    """Return a stack for each kind of parameter, in the given dtype; all of a dtype are copied at once."""
    copies: dict[int, Tensor] = {}
    with torch.no_grad():
        for dtype in dict.fromkeys(dtypes):
            places = [place for place, other in enumerate(dtypes) if other == dtype]
            sizes = [len(kinds[place]) * kinds[place][0].numel() for place in places]
            starts = [0, *itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
            memory = torch.empty(starts[-1], dtype=dtype, device=kinds[places[0]][0].device)
            for place, start, size in zip(places, starts, sizes, strict=False):
                copies[place] = memory[start : start + size].view(len(kinds[place]), *kinds[place][0].shape)
            targets = [target for place in places for target in copies[place].unbind(0)]
            torch._foreach_copy_(targets, [parameter for place in places for parameter in kinds[place]])
    return [Stack(kind, copies[place]) for place, kind in enumerate(kinds)]


def run_stacked_blocks(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Stack | None,
    weights: StackedWeights,
    heads: int,
    epsilon: float,
    plan: Plan,
) -> Results:
    """Compute `transformer_block` of W models; the first of W equal parts of the samples is for the first, and so on.

    Args:
        x: `[W*B, N, D]`.
        residual, residual_bias: see `transformer_block`.
        weights: the parameters of the models' blocks.
        heads: number of heads.
        epsilon: added to the variances.
        plan: what `plan_together` returned for the block.
    """
    stacks = (residual_bias, *weights.block)
    types = [None if tensor is None else tensor.dtype for tensor in (x, residual)]
    types += [None if stack is None else stack.parameters[0].dtype for stack in stacks]
    matmuls = _stacked_matmuls(len(weights.last_bias.parameters), plan.matmuls)
    results: Results = _apply_blocks(
        *(plan._replace(dtypes=tuple(types), matmuls=matmuls), heads, epsilon),
        *([None if stack is None else stack.copy for stack in stacks], x, residual),
        *[parameter for stack in stacks if stack is not None for parameter in stack.parameters],
    )
    return results


_apply_blocks = fast_apply(StackedBlocks)


def run_stacked_norm(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Stack | None,
    weight: Stack,
    bias: Stack,
    epsilon: float,
) -> Tensor:
    """Return the layer norm of `x + residual + residual_bias`, `[W*B, N, D]`, each part with its model's weights."""
    stacks = (residual_bias, weight, bias)
    dtype = torch.float32 if is_autocast(x) else total_dtype(x, residual)
    parameters = [parameter for stack in stacks if stack is not None for parameter in stack.parameters]
    copies = [None if stack is None else stack.copy for stack in stacks]
    norm: Tensor = _apply_norm(x, residual, copies, epsilon, dtype, *parameters)
    return norm


class _StackedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        stacks: Sequence[Tensor | None],
        epsilon: float,
        dtype: torch.dtype,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.counts = [0 if stack is None else stack.shape[0] for stack in stacks]
        results = AddLayerNorm.forward(ctx, x, residual, *stacks, epsilon, dtype, "triton")
        norm: Tensor = results if residual is None else results[1]
        return norm

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        grad_x, grad_residual, *grad_stacks = AddLayerNorm.backward(ctx, None, grad)[:5]
        return (grad_x, grad_residual, None, None, None, *unstacked(grad_stacks, ctx.counts))


_apply_norm = fast_apply(_StackedNorm)


def _stacked_matmuls(count: int, single: Matmuls) -> Matmuls:
    """Return batched matrix products of `count` equal parts of the rows with a stack of weights.

    Args:
        single: the products of one weight.
    """

    def parts(rows: Tensor) -> Tensor:
        return rows.reshape(count, -1, rows.shape[-1])

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        factors = parts(x), weight.mT
        out = torch.bmm(*factors) if bias is None else torch.baddbmm(bias[:, None], *factors)
        return out.view(*x.shape[:-1], weight.shape[1])

    def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(parts(grad), weight).view(-1, weight.shape[2])

    def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
        factors = parts(grad).mT, parts(x)
        return torch.bmm(*factors, out_dtype=torch.float32) if single is INTO_FLOAT32 else torch.bmm(*factors)

    return Matmuls(linear, input_gradient, weight_gradient, single.dtype)

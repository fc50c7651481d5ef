"""The operators behind every backend of the flash kind, which autograd, torch.compile and counters see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.flash import Triple, flash


def unpacked(projected: Sequence[Tensor]) -> Triple:
    """Queries, keys and values, as views of packed tensors."""
    *alone, last = projected
    parts = 3 - len(alone)
    q, k, v = (*alone, last) if parts == 1 else (*alone, *last.unbind(2))
    return q, k, v


@torch.library.custom_op("mmmae::attention", mutates_args=())
def attention_forward(projected: Sequence[Tensor], key_present: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """Attention `[B, Nq, h, d]`, and each row's log-sum-exp, float32 `[B, h, Nq]`; `projected` is q, k, v or packed."""
    q, k, v = unpacked(projected)
    if _is_empty(q, k):
        batch, queries, heads, _ = q.shape
        return q.new_zeros(q.shape), q.new_full((batch, heads, queries), -math.inf, dtype=torch.float32)
    out, lse = flash(backend).attention_forward(q, k, v, key_present)
    return out.contiguous(), lse.contiguous()


@attention_forward.register_fake
def _(projected: Sequence[Tensor], key_present: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    q, _, _ = unpacked(projected)
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("mmmae::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, projected: Sequence[Tensor], key_present: Tensor | None, out: Tensor, lse: Tensor, backend: str
) -> list[Tensor]:
    """Gradients of what was projected, packed as it is."""
    q, k, v = unpacked(projected)
    if _is_empty(q, k):
        return [tensor.new_zeros(tensor.shape) for tensor in projected]
    gradients = [tensor.new_empty(tensor.shape) for tensor in projected]
    flash(backend).attention_backward(grad, (q, k, v), key_present, out, lse, unpacked(gradients))
    return gradients


@attention_backward.register_fake
def _(
    grad: Tensor, projected: Sequence[Tensor], key_present: Tensor | None, out: Tensor, lse: Tensor, backend: str
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in projected]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    projected, key_present, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # of lse, which is nobody's result
    ctx.save_for_backward(*projected, key_present, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[list[Tensor], None, None]:
    *projected, key_present, out, lse = ctx.saved_tensors
    return attention_backward(grad, projected, key_present, out, lse, ctx.backend), None, None


attention_forward.register_autograd(_backward, setup_context=_keep)


def _is_empty(q: Tensor, k: Tensor) -> bool:
    """Whether there is nothing to attend: libraries answer that with errors, with garbage, or by ending the process."""
    return 0 in q.shape or 0 in k.shape

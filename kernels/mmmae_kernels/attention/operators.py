"""Attention by a flash backend: as a Python function, as a torch operator, and as an autograd function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import declare_calls, define, first_derivative_only, needs_operators
from .backends.flash import Triple, flash_backend


def unpacked(projected: Sequence[Tensor]) -> Triple:
    """Return queries, keys and values from q, k, v or from packed tensors, as views."""
    *alone, last = projected
    parts = 3 - len(alone)
    q, k, v = (*alone, last) if parts == 1 else (*alone, *last.unbind(2))
    return q, k, v


def _forward(projected: Sequence[Tensor], key_present: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """Return attention `[B, Nq, h, d]` and its log-sum-exps, float32 `[B, h, Nq]`.

    Args:
        projected: q, k, v, or packed tensors.
    """
    q, k, v = unpacked(projected)
    if _is_empty(q, k):
        batch, queries, heads, _ = q.shape
        return q.new_zeros(q.shape), q.new_full((batch, heads, queries), -math.inf, dtype=torch.float32)
    out, lse = flash_backend(backend).attention_forward(q, k, v, key_present)
    return out.contiguous(), lse.contiguous()


def _backward(
    grad: Tensor, projected: Sequence[Tensor], key_present: Tensor | None, out: Tensor, lse: Tensor, backend: str
) -> list[Tensor]:
    """Return the gradients of `projected`, packed in the same way."""
    q, k, v = unpacked(projected)
    if _is_empty(q, k):
        return [tensor.new_zeros(tensor.shape) for tensor in projected]
    gradients = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in projected]
    given = flash_backend(backend).attention_backward(grad, (q, k, v), key_present, out, lse, unpacked(gradients))
    return gradients if given is None else _packed(given, gradients)


def _packed(given: Triple, places: list[Tensor]) -> list[Tensor]:
    """Return the gradients of q, k and v packed as `places` are, whose packed tensor receives them in one launch."""
    *alone, last = places
    parts = 3 - len(alone)
    if parts > 1:
        torch.stack(given[-parts:], dim=2, out=last)
        return [gradient.contiguous() for gradient in given[:-parts]] + [last]
    return [gradient.contiguous() for gradient in given]


def _forward_fake(projected: Sequence[Tensor], key_present: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    q, _, _ = unpacked(projected)
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)


def _backward_fake(grad: Tensor, projected: Sequence[Tensor], *rest: object) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in projected]


_forward_operator = define(
    "attention(Tensor[] projected, Tensor? key_present, str backend) -> (Tensor, Tensor)", _forward, _forward_fake
)
_backward_operator = define(
    "attention_backward(Tensor grad, Tensor[] projected, Tensor? key_present, Tensor out, Tensor lse, str backend) -> "
    "Tensor[]",
    _backward,
    _backward_fake,
)

declare_calls(attention_forward=(_forward, _forward_operator), attention_backward=(_backward, _backward_operator))

Forward = Callable[[Sequence[Tensor], Tensor | None, str], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Sequence[Tensor], Tensor | None, Tensor, Tensor, str], list[Tensor]]


def forward_for(tensor: Tensor) -> Forward:
    """Return the forward function, as an operator if `needs_operators(tensor)`."""
    return _forward_operator if needs_operators(tensor) else _forward


def backward_for(tensor: Tensor) -> Backward:
    """Return the backward function, as an operator if `needs_operators(tensor)`."""
    return _backward_operator if needs_operators(tensor) else _backward


class FlashAttention(torch.autograd.Function):
    """Attention by a flash backend, of q, k and v or of packed tensors."""

    @staticmethod
    def forward(ctx: Any, key_present: Tensor | None, backend: str, *projected: Tensor) -> Tensor:
        out, lse = forward_for(projected[0])(projected, key_present, backend)
        ctx.save_for_backward(*projected, key_present, out, lse)
        ctx.backend = backend
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *projected, key_present, out, lse = ctx.saved_tensors
        return None, None, *backward_for(grad)(grad, projected, key_present, out, lse, ctx.backend)


def _is_empty(q: Tensor, k: Tensor) -> bool:
    """Return whether q or k is empty, for which libraries raise, return garbage or crash."""
    return 0 in q.shape or 0 in k.shape

"""Attention on the CPU, float32, forward and backward, without the scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cpu import library
from ...dispatch import Reason
from ..call import Call
from .flash import Triple

HEAD_WIDTH_LIMIT = 256


def refuses(call: Call) -> Reason:
    if call.target != "cpu":
        return f"the tensors lie on {call.target}, native kernels run on the CPU"
    if call.dtype != torch.float32:
        return f"the tensors have dtype {call.dtype}, native kernels take float32"
    if call.head_width > HEAD_WIDTH_LIMIT:
        return f"the head width is {call.head_width}, native kernels take up to {HEAD_WIDTH_LIMIT}"
    return None


unavailable = library.unavailable_reason


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of the sum of each row's exponentials, for the gradients.

    Args:
        q: `[B, Nq, h, d]`, d at most HEAD_WIDTH_LIMIT.
        k, v: `[B, Nk, h, d]`.
        key_present: `[B, Nk]` bool, which keys a sample has; None means all. Nothing is read of the absent ones.

    Returns:
        out: `[B, Nq, h, d]`; zeros for a sample without keys.
        lse: `[B, h, Nq]`, minus infinity there.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    q, k, v = library.rows_of(q), library.rows_of(k), library.rows_of(v)
    if q.dim() != 4:
        raise ValueError(f"q has shape {list(q.shape)}, expected is [B, Nq, h, d]")
    batch, queries, heads, _ = q.shape
    out, lse = torch.empty(q.shape), torch.empty(batch, heads, queries)
    library.call("attention_forward", q, k, v, key_present, out, lse)
    return out, lse


def attention_backward(
    grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
) -> None:
    """Write the gradients of q, k and v into `gradients`, all of them, zeros for absent keys.

    `out` and `lse` may be those of more keys than these, of which they then give the share of the gradients.

    Args:
        grad: of `out`, `[B, Nq, h, d]`.
        qkv, key_present: as in `attention_forward`.
        out, lse: what that gave.
        gradients: like q, k and v, of any strides but for the last axis, which lies in one piece.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    inputs = (library.rows_of(tensor) for tensor in (grad, *qkv))
    library.call("attention_backward", *inputs, key_present, library.rows_of(out), lse.contiguous(), *gradients)

"""Keys and values of guiding vectors, merged into attention to the tokens by their log-sum-exps.

Flash kernels take no mask, so a sample's absent vectors would have to be cut out of its keys: keys of variable length,
which need a copy of the keys and values of all tokens for the sake of a few vectors. Instead the kernel attends to the
tokens alone, and the vectors, a handful, are a second softmax in plain PyTorch. With the scores s of the vectors,

    lse' = log(exp(lse) + sum(exp(s)))        out' = exp(lse - lse') out + exp(s - lse') v

which is the softmax over both. The kernel's backward gets lse' and out' and gives its part of the gradients of that
softmax, see `flash.py`; the vectors' part is written out below. An absent vector has a score of minus infinity: it adds
exactly nothing, and where a sample has none, out' is out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..operators import first_derivative_only
from .backends.flash import scale_of
from .operators import backward_for, forward_for


def merge(q: Tensor, out: Tensor, lse: Tensor, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to tokens and vectors.

    Args:
        q: `[B, N, h, d]`.
        out, lse: attention to the tokens, `[B, N, h, d]` and float32 `[B, h, N]`.
        vectors: keys and values `[B, m, 2, h, d]`.
        present: bool `[B, m]`.

    Returns:
        The same two of tokens and vectors.
    """
    keys, values = _present_keys_and_values(vectors, present)
    with torch.autocast(q.device.type, enabled=False):
        scores = _scores(q, keys, present)
        merged = torch.logaddexp(lse, scores.logsumexp(-1))
        share = (scores - merged[..., None]).exp()
        kept = (lse - merged).exp().transpose(1, 2)[..., None]
        mixed = out * kept + (share @ values.transpose(1, 2)).transpose(1, 2)
    return mixed.to(out.dtype), merged


def merge_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, vectors: Tensor, present: Tensor
) -> tuple[Tensor, Tensor]:
    """What the vectors add to the gradient of q, and their own.

    Args:
        grad: of the merged `out`.
        q, vectors, present: as in `merge`.
        out, lse: what it gave.

    Returns:
        Float32 `[B, N, h, d]`, and `[B, m, 2, h, d]` like `vectors`.
    """
    keys, values = _present_keys_and_values(vectors, present)
    grad, q_floats = _floats(grad), _floats(q)
    with torch.autocast(q.device.type, enabled=False):
        share = (_scores(q, keys, present) - lse[..., None]).exp()
        subtracted = (grad * out).sum(-1).transpose(1, 2)[..., None]
        grad_scores = share * (torch.einsum("bnhd,bmhd->bhnm", grad, values) - subtracted) * scale_of(q)
        grad_q = torch.einsum("bhnm,bmhd->bnhd", grad_scores, keys)
        grad_keys = torch.einsum("bhnm,bnhd->bmhd", grad_scores, q_floats)
        grad_values = torch.einsum("bhnm,bnhd->bmhd", share, grad)
    return grad_q, torch.stack([grad_keys, grad_values], dim=2).to(vectors.dtype)


def _present_keys_and_values(vectors: Tensor, present: Tensor) -> tuple[Tensor, ...]:
    """Keys and values `[B, m, h, d]`; zeros for absent vectors, whose contents may be anything."""
    return torch.where(present[:, :, None, None, None], _floats(vectors), 0.0).unbind(2)


def _scores(q: Tensor, keys: Tensor, present: Tensor) -> Tensor:
    """`[B, h, N, m]`, minus infinity for absent vectors."""
    scores = torch.einsum("bnhd,bmhd->bhnm", _floats(q), keys) * scale_of(q)
    return torch.where(present[:, None, None, :], scores, -math.inf)


def _floats(tensor: Tensor) -> Tensor:
    """At least in float32: a score rounded to bfloat16 is off by up to 2^-9 of itself, its exponential by more.

    For the same reason autocast, which would round what it multiplies, is off wherever these are.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class MergedAttention(torch.autograd.Function):
    """Attention of packed tokens to themselves and to the vectors that a sample has, by a backend of the flash kind."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, vectors: Tensor, present: Tensor, backend: str) -> Tensor:
        """Return `[B, N, h, d]` of qkv `[B, N, 3, h, d]`, vectors `[B, m, 2, h, d]` and present, bool `[B, m]`."""
        out, lse = merge(qkv.select(2, 0), *forward_for(qkv)([qkv], None, backend), vectors, present)
        ctx.save_for_backward(qkv, vectors, present, out, lse)
        ctx.backend = backend
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, vectors, present, out, lse = ctx.saved_tensors
        (grad_qkv,) = backward_for(grad)(grad, [qkv], None, out, lse, ctx.backend)
        grad_q, grad_vectors = merge_backward(grad, qkv.select(2, 0), out, lse, vectors, present)
        grad_qkv.select(2, 0).add_(grad_q)
        return grad_qkv, grad_vectors, None, None

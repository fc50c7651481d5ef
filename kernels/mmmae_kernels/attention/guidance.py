"""Attention to tokens and a few vectors, from attention to the tokens by merging log-sum-exps.

Flash kernels take no mask, so absent vectors would have to be removed from the keys. Keys would then have a different
length in each sample, and the keys and values of all tokens would be copied for the sake of a few vectors. Instead the
kernel attends to the tokens alone, and a second softmax over the vectors is computed in plain PyTorch. With the scores
s and the values v of the vectors, the softmax over both is

    lse' = log(exp(lse) + sum(exp(s)))        out' = exp(lse - lse') out + exp(s - lse') v

The kernel's backward takes lse' and out' and returns its part of the gradients, see `flash.py`; the part of the vectors
is computed below. An absent vector has a score of minus infinity and contributes exactly zero; for a sample without
vectors, out' equals out.
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
    """Merge attention to vectors into attention to tokens.

    Args:
        q: `[B, N, h, d]`.
        out, lse: attention to the tokens, `[B, N, h, d]`, and its log-sum-exps, float32 `[B, h, N]`.
        vectors: keys and values of the vectors, `[B, m, 2, h, d]`.
        present: `[B, m]` bool, which vectors are present.

    Returns:
        `out` and `lse` of attention to tokens and vectors.
    """
    keys, values = _present_keys_and_values(vectors, present)
    with torch.autocast(q.device.type, enabled=False):
        scores = _scores(q, keys, present)
        merged = torch.logaddexp(lse, scores.logsumexp(-1))
        weights = (scores - merged[..., None]).exp()
        token_share = (lse - merged).exp().transpose(1, 2)[..., None]
        merged_out = out * token_share + (weights @ values.transpose(1, 2)).transpose(1, 2)
    return merged_out.to(out.dtype), merged


def merge_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, vectors: Tensor, present: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the vectors' contribution to the gradient of q, and the gradient of the vectors.

    Args:
        grad: gradient of the merged `out`.
        q, vectors, present: inputs of `merge`.
        out, lse: outputs of `merge`.

    Returns:
        `[B, N, h, d]` in float32, and `[B, m, 2, h, d]` in the dtype of `vectors`.
    """
    keys, values = _present_keys_and_values(vectors, present)
    grad, q_floats = _floats(grad), _floats(q)
    with torch.autocast(q.device.type, enabled=False):
        weights = (_scores(q, keys, present) - lse[..., None]).exp()
        delta = (grad * out).sum(-1).transpose(1, 2)[..., None]
        grad_scores = weights * (torch.einsum("bnhd,bmhd->bhnm", grad, values) - delta) * scale_of(q)
        grad_q = torch.einsum("bhnm,bmhd->bnhd", grad_scores, keys)
        grad_keys = torch.einsum("bhnm,bnhd->bmhd", grad_scores, q_floats)
        grad_values = torch.einsum("bhnm,bnhd->bmhd", weights, grad)
    return grad_q, torch.stack([grad_keys, grad_values], dim=2).to(vectors.dtype)


def _present_keys_and_values(vectors: Tensor, present: Tensor) -> tuple[Tensor, ...]:
    """Return keys and values `[B, m, h, d]`, with zeros for absent vectors, which may contain NaN."""
    return torch.where(present[:, :, None, None, None], _floats(vectors), 0.0).unbind(2)


def _scores(q: Tensor, keys: Tensor, present: Tensor) -> Tensor:
    """Return the scores `[B, h, N, m]`, minus infinity for absent vectors."""
    scores = torch.einsum("bnhd,bmhd->bhnm", _floats(q), keys) * scale_of(q)
    return torch.where(present[:, None, None, :], scores, -math.inf)


def _floats(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or higher precision.

    A score rounded to bfloat16 has a relative error of up to 2^-9, its exponential a larger one. The callers disable
    autocast for the same reason.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class MergedAttention(torch.autograd.Function):
    """Attention from packed tokens to themselves and to the present vectors, by a flash backend."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, vectors: Tensor, present: Tensor, backend: str) -> Tensor:
        """Compute `[B, N, h, d]` from qkv `[B, N, 3, h, d]`, vectors `[B, m, 2, h, d]` and present, bool `[B, m]`."""
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

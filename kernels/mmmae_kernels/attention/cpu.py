"""Merging of a few vectors into attention to tokens where Triton does not serve: plain PyTorch, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends.flash import scale_of


def merge_vectors(q: Tensor, out: Tensor, lse: Tensor, vectors: Tensor, present: Tensor) -> Tensor:
    """Merge attention to the vectors into `out`, in place, and return the merged log-sum-exps."""
    keys, values = _present_keys_and_values(vectors, present)
    with torch.autocast(q.device.type, enabled=False):
        scores = _scores(q, keys, present)
        merged = torch.logaddexp(lse, scores.logsumexp(-1))
        weights = (scores - merged[..., None]).exp()
        token_share = (lse - merged).exp().transpose(1, 2)[..., None]
        torch.addcmul((weights @ values.transpose(1, 2)).transpose(1, 2), out, token_share, out=out)
    return merged


def merge_vectors_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, vectors: Tensor, present: Tensor, grad_q: Tensor
) -> Tensor:
    """Add the vectors' part to `grad_q`, in place, and return the gradient of the vectors."""
    keys, values = _present_keys_and_values(vectors, present)
    grad = _floats(grad)
    with torch.autocast(q.device.type, enabled=False):
        weights = (_scores(q, keys, present) - lse[..., None]).exp()
        delta = (grad * out).sum(-1).transpose(1, 2)[..., None]
        grad_scores = weights * (torch.einsum("bnhd,bmhd->bhnm", grad, values) - delta) * scale_of(q)
        grad_q.add_(torch.einsum("bhnm,bmhd->bnhd", grad_scores, keys))
        grad_keys = torch.einsum("bhnm,bnhd->bmhd", grad_scores, _floats(q))
        grad_values = torch.einsum("bhnm,bnhd->bmhd", weights, grad)
    return torch.stack([grad_keys, grad_values], dim=2).to(vectors.dtype)


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

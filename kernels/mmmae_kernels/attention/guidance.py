"""Attention to tokens and a few vectors, from attention to the tokens by merging log-sum-exps.

Flash kernels take no mask, so absent vectors would have to be removed from the keys. Keys would then have a different
length in each sample, and the keys and values of all tokens would be copied for the sake of a few vectors. Instead the
kernel attends to the tokens alone, and its result is merged with a softmax over the vectors. With the scores s and the
values v of the vectors, the softmax over both is

    lse' = log(exp(lse) + sum(exp(s)))        out' = exp(lse - lse') out + exp(s - lse') v

The kernel's backward takes lse' and out' and returns its part of the gradients, see `flash.py`; then the part of the
vectors is added. An absent vector has a score of minus infinity and contributes exactly zero; for a sample without
vectors, out' equals out.

`cpu.py` says this in plain PyTorch, `gpu.py` does it in one kernel each way. Both overwrite out by out', as nothing
else reads what the flash kernel returned, and add to the gradient of q that its backward wrote.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..operators import declare_operator, first_derivative_only, kernels_for
from .operators import backward_for, forward_for

# Overwrites `out`, attention to the tokens, contiguous `[B, N, h, d]`, by attention to tokens and vectors, and returns
# the log-sum-exps of both, given those of the tokens, float32 `[B, h, N]`. q is `[B, N, h, d]`; vectors, keys and
# values `[B, m, 2, h, d]`; present, bool `[B, m]`.
declare_operator(
    "attention",
    "merge_vectors(Tensor q, Tensor(a!) out, Tensor lse, Tensor vectors, Tensor present) -> Tensor",
    lambda q, out, lse, *rest: lse.new_empty(lse.shape),
)

# Adds the vectors' part to `grad_q [B, N, h, d]`, and returns the gradient of the vectors, given the gradient of the
# merged `out`, and the merged `out` and `lse`.
declare_operator(
    "attention",
    "merge_vectors_backward(Tensor grad, Tensor q, Tensor out, Tensor lse, Tensor vectors, Tensor present, "
    "Tensor(a!) grad_q) -> Tensor",
    lambda grad, q, out, lse, vectors, *rest: vectors.new_empty(vectors.shape),
)


def merging_backend(q: Tensor) -> str:
    """Return the backend whose kernels merge: `triton` if it supports `q`, else `native`, which takes all tensors."""
    if dispatch.current_backend() not in ("auto", "triton"):
        return "native"
    refused = dispatch.triton_unavailable() or dispatch.triton_refuses([("q", q)])
    return "triton" if refused is None else "native"


class MergedAttention(torch.autograd.Function):
    """Attention from packed tokens to themselves and to the present vectors, by a flash backend."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, vectors: Tensor, present: Tensor, backend: str, merging: str) -> Tensor:
        """Compute `[B, N, h, d]` from qkv `[B, N, 3, h, d]`, vectors `[B, m, 2, h, d]` and present, bool `[B, m]`.

        Args:
            backend: backend of attention to the tokens.
            merging: backend of the kernels that merge, see `merging_backend`.
        """
        out, lse = forward_for(qkv)([qkv], None, backend)
        lse = kernels_for(qkv, merging).merge_vectors(qkv.select(2, 0), out, lse, vectors, present)
        ctx.save_for_backward(qkv, vectors, present, out, lse)
        ctx.backend, ctx.merging = backend, merging
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, vectors, present, out, lse = ctx.saved_tensors
        (grad_qkv,) = backward_for(grad)(grad, [qkv], None, out, lse, ctx.backend)
        grad_vectors = kernels_for(grad, ctx.merging).merge_vectors_backward(
            grad, qkv.select(2, 0), out, lse, vectors, present, grad_qkv.select(2, 0)
        )
        return grad_qkv, grad_vectors, None, None, None

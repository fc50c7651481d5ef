"""Attention by PyTorch's own build of flash-attn 2, for NVIDIA GPUs from Ampere on and for AMD's CDNA."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Reason, constant_when_compiled
from ..call import Call, flash_refuses
from . import torch_operators
from .flash import Triple, scale_of
from .torch_operators import gpu_refuses, heads_first, operator, random_state, tokens_first

FORWARD, BACKWARD = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
SMALL = ("sm86", "sm87", "sm89", "sm120", "sm121")  # have less shared memory


def refuses(call: Call) -> Reason:
    if call.target in SMALL and 192 < call.head_width <= 224:
        return f"the head width is {call.head_width}, its backward on {call.target} takes none from 200 to 224"
    return gpu_refuses(call) or flash_refuses(call)


def unavailable() -> Reason:
    reason: Reason = torch_operators.gpu_missing(FORWARD, BACKWARD) or _not_built()
    return reason


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = operator(FORWARD)(*heads_first(q, k, v), 0.0, False, scale=scale_of(q))
    return out.transpose(1, 2), lse


def attention_backward(
    grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
) -> Triple:
    q, k, _ = qkv
    tensors = *heads_first(grad, *qkv, out), lse.contiguous()
    dense = None, None, q.shape[1], k.shape[1]  # all samples have the same number of tokens
    given = operator(BACKWARD)(*tensors, *dense, 0.0, False, *_random_state(q), scale=scale_of(q))
    return tokens_first(*given)


def _random_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return a state of dropout in the form that this operator's forward gives it."""
    if torch.version.hip:
        return random_state(q)
    return q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)


@constant_when_compiled
def _not_built() -> Reason:
    return None if torch.backends.cuda.is_flash_attention_available() else "PyTorch was built without flash attention"

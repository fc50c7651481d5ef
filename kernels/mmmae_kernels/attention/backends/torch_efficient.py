"""Attention by PyTorch's memory-efficient kernels, for GPUs in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ...dispatch import HALVES, Reason
from ..call import Call
from . import torch_operators
from .flash import Triple, scale_of
from .torch_operators import gpu_refuses, heads_first, operator, random_state, tokens_first

FORWARD, BACKWARD = "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"
WIDEST = 256
LSE_ROWS = 32  # backward on NVIDIA GPUs reads this many log-sum-exps at a time


def refuses(call: Call) -> Reason:
    if call.dtype not in (torch.float32, *HALVES):
        return f"the tensors have dtype {call.dtype}, it takes float32, float16 and bfloat16"
    if call.masked:
        return "it does not support key_present"
    multiple = 8 if call.dtype in HALVES else 4
    if call.head_width % multiple or call.head_width > WIDEST:
        return f"the head width is {call.head_width}, it takes multiples of {multiple} up to {WIDEST}"
    return gpu_refuses(call)


def unavailable() -> Reason:
    reason: Reason = torch_operators.gpu_missing(FORWARD, BACKWARD)
    return reason


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = operator(FORWARD)(*heads_first(q, k, v), None, True, scale=scale_of(q))
    return out.transpose(1, 2), lse[..., : q.shape[1]]


def attention_backward(
    grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
) -> Triple:
    q, _, _ = qkv
    absent = -lse.shape[-1] % LSE_ROWS
    if absent and not torch.version.hip:
        lse = F.pad(lse, (0, absent), value=math.inf)  # so that absent rows have no weight
    tensors = *heads_first(grad, *qkv), None, *heads_first(out), lse.contiguous()
    wanted = [True, True, True, False]  # no mask, so no gradient of one
    *given, _ = operator(BACKWARD)(*tensors, *random_state(q), 0.0, wanted, scale=scale_of(q))
    return tokens_first(*given)

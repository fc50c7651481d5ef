"""Attention by PyTorch's flash kernel for CPUs, in the dtypes that the native kernels don't take."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import HALVES, Reason
from ..call import Call
from .flash import Triple, scale_of
from .torch_operators import missing, operator, tokens_first

FORWARD, BACKWARD = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def refuses(call: Call) -> Reason:
    if call.target != "cpu":
        return f"the tensors are on {call.target}, it runs on the CPU"
    if call.dtype not in (torch.float32, *HALVES):
        return f"the tensors have dtype {call.dtype}, it takes float32, float16 and bfloat16"
    return "it does not support key_present" if call.masked else None


def unavailable() -> Reason:
    reason: Reason = missing(FORWARD, BACKWARD)
    return reason


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = operator(FORWARD)(*_heads_first(q, k, v), 0.0, False, scale=scale_of(q))
    return out.transpose(1, 2), lse


def attention_backward(
    grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
) -> Triple:
    given = operator(BACKWARD)(*_heads_first(grad, *qkv, out), lse, 0.0, False, scale=scale_of(grad))
    return tokens_first(*given)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Return tensors `[B, N, h, d]` as views `[B, h, N, d]`, copied before unless their last axis is contiguous."""
    return [(tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2) for tensor in tensors]

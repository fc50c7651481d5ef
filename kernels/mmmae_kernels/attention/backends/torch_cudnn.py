"""Attention by cuDNN through PyTorch, which uses the matrix instructions of Hopper and Blackwell."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...dispatch import Reason, constant_when_compiled
from ..call import Call, flash_refuses
from . import torch_flash, torch_operators
from .flash import Triple, scale_of
from .torch_operators import heads_first, operator, random_state, tokens_first

FORWARD, BACKWARD = "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"
TARGETS = ("sm90", "sm100", "sm103")  # PyTorch's flash kernel does not use the matrix instructions of these
OLDEST = 91501  # older ones access memory out of bounds unless the number of tokens is a multiple of 128
RAGGED = "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"
WIDEST = 128


def refuses(call: Call) -> Reason:
    if call.target not in TARGETS:
        return f"it is for compute capability 9.0, 10.0 and 10.3, not {call.target}"
    if call.deterministic:
        return "its backward has no deterministic mode"
    return flash_refuses(call, widest=WIDEST)


def unavailable() -> Reason:
    reason: Reason = torch_operators.gpu_missing(FORWARD, BACKWARD) or torch_flash.unavailable() or cudnn_refuses()
    return reason


@constant_when_compiled
def cudnn_refuses() -> Reason:
    """Return None if this machine's cuDNN computes attention to any number of tokens, else the reason."""
    version = None if torch.version.hip else torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if version is None:
        return "PyTorch was built without cuDNN"
    if version < OLDEST:
        return f"cuDNN is {_spelled(version)}, expected {_spelled(OLDEST)} or newer"
    if os.environ.get(RAGGED, "0") != "0":
        return f"{RAGGED} is set, with which log-sum-exps have another layout"
    return None


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> tuple[Tensor, Tensor]:
    if _is_single(q, k):
        return torch_flash.attention_forward(q, k, v, key_present)
    out, lse, *_ = operator(FORWARD)(*heads_first(q, k, v), None, True, 0.0, False, False, scale=scale_of(q))
    return out.transpose(1, 2), lse.view(out.shape[:3])


def attention_backward(
    grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
) -> Triple:
    q, k, _ = qkv
    if _is_single(q, k):
        return torch_flash.attention_backward(grad, qkv, key_present, out, lse, gradients)
    tensors = *heads_first(grad.contiguous(), *qkv, out), lse.contiguous().unsqueeze(-1)
    dense = None, None, None, q.shape[1], k.shape[1]  # no mask, and the same number of tokens in all samples
    given = operator(BACKWARD)(*tensors, *random_state(q), *dense, 0.0, False, scale=scale_of(q))
    return tokens_first(*given)


def _is_single(q: Tensor, k: Tensor) -> bool:
    """Return whether there is a single query or key, which not all versions of cuDNN support."""
    return q.shape[1] == 1 or k.shape[1] == 1


def _spelled(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"

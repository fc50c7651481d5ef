"""Attention by flash-attn 3 (`flash_attn_interface`), written for Hopper.

It calls the operators that the extension registers: from version to version the Python functions changed, the
operators' argument names did not. The number of results did, so only the first two are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Reason, constant_when_compiled
from ..call import Call, flash_refuses
from . import packages
from .flash import Triple, aligned_rows, on_device_of, scale_of

PACKAGE = "flash-attn-3", "flash_attn_interface"


def refuses(call: Call) -> Reason:
    if call.capability != (9, 0):
        return f"its kernels are for compute capability 9.0, not {call.target}"
    if call.deterministic and call.head_width == 256:
        return "its backward is not deterministic at a head width of 256"
    return flash_refuses(call)


def unavailable() -> Reason:
    reason: Reason = packages.refuses(*PACKAGE) or _too_old()
    return reason


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> tuple[Tensor, Tensor]:
    packages.load(PACKAGE[1])
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    with on_device_of(q):
        out, lse = torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=scale_of(q), is_causal=False, num_splits=1)[:2]
    return out, lse


def attention_backward(
    grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
) -> None:
    packages.load(PACKAGE[1])
    (q, k, v), (grad_q, grad_k, grad_v) = map(aligned_rows, qkv), gradients
    with on_device_of(q):
        torch.ops.flash_attn_3.bwd(
            aligned_rows(grad),
            q,
            k,
            v,
            aligned_rows(out),
            lse.contiguous(),
            dq=grad_q,
            dk=grad_k,
            dv=grad_v,
            softmax_scale=scale_of(q),
            is_causal=False,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


@constant_when_compiled
def _too_old() -> Reason:
    packages.load(PACKAGE[1])
    if not hasattr(torch.ops.flash_attn_3, "bwd"):
        return "this flash-attn-3 is too old: it registers no operators"
    known = {argument.name for argument in torch.ops.flash_attn_3.bwd.default._schema.arguments}
    missing = {"dq", "dk", "dv", "softmax_scale", "is_causal", "deterministic"} - known
    return f"this flash-attn-3 is too old: its backward lacks {', '.join(sorted(missing))}" if missing else None

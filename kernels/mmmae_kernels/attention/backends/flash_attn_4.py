"""Attention by flash-attn 4 (`flash_attn.cute`), written for Hopper and Blackwell.

It calls the package's internal functions, the only ones that take changed log-sum-exps and write into given gradients.
Their signatures grew from beta to beta, so arguments are passed by name and only the first two results are read.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ...dispatch import Reason, constant_when_compiled
from ..call import Call, flash_refuses
from . import packages
from .flash import Triple, aligned_rows, on_device_of, scale_of

PACKAGE = "flash-attn-4", "flash_attn.cute.interface"
WIDEST = {9: 256, 10: 128, 11: 128, 12: 128}  # by compute capability


def refuses(call: Call) -> Reason:
    if call.capability is None or call.capability[0] not in WIDEST:
        return f"its kernels are for compute capability 9 to 12, not {call.target}"
    if call.deterministic and call.capability[0] == 12:
        return "its backward is not deterministic on compute capability 12"
    return flash_refuses(call, widest=WIDEST[call.capability[0]])


def unavailable() -> Reason:
    reason: Reason = packages.refuses(*PACKAGE) or _too_old()
    return reason


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> tuple[Tensor, Tensor]:
    library = packages.load(PACKAGE[1])
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    with on_device_of(q):
        out, lse = library._flash_attn_fwd(
            q, k, v, softmax_scale=scale_of(q), causal=False, num_splits=1, return_lse=True
        )[:2]
    return out, lse


def attention_backward(
    grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
) -> None:
    library = packages.load(PACKAGE[1])
    (q, k, v), (grad_q, grad_k, grad_v) = map(aligned_rows, qkv), gradients
    with on_device_of(q):
        library._flash_attn_bwd(
            q=q,
            k=k,
            v=v,
            out=aligned_rows(out),
            dout=aligned_rows(grad),
            lse=lse.contiguous(),
            softmax_scale=scale_of(q),
            causal=False,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=grad_q,
            dk=grad_k,
            dv=grad_v,
        )


@constant_when_compiled
def _too_old() -> Reason:
    known = inspect.signature(packages.load(PACKAGE[1])._flash_attn_bwd).parameters
    missing = [name for name in ("deterministic", "dq", "dk", "dv") if name not in known]
    return f"this flash-attn-4 is too old: its backward lacks {', '.join(missing)}" if missing else None

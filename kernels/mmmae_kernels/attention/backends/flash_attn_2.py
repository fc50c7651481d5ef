"""Attention by flash-attn 2 (`flash_attn`), for NVIDIA GPUs from Ampere on and for AMD's CDNA.

It calls the package's internal operators: the public functions neither return a usable log-sum-exp nor write gradients
into given tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import Reason, constant_when_compiled
from ..call import Call, flash_refuses
from . import packages
from .flash import Triple, aligned_rows, on_device_of, scale_of

PACKAGE = "flash-attn", "flash_attn.flash_attn_interface"
AMD = ("gfx90a", "gfx942", "gfx950")


def refuses(call: Call) -> Reason:
    if call.target not in AMD and (call.capability is None or call.capability[0] < 8):
        return f"its kernels are for compute capability 8 and above and for {', '.join(AMD)}, not {call.target}"
    return flash_refuses(call)


def unavailable() -> Reason:
    reason: Reason = packages.refuses(*PACKAGE) or _too_old()
    return reason


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> tuple[Tensor, Tensor]:
    library = packages.load(PACKAGE[1])
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    with on_device_of(q):
        out, lse, *_ = library._wrapped_flash_attn_forward(q=q, k=k, v=v, return_softmax=False, **_plain(q))
    return out, lse


def attention_backward(
    grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
) -> None:
    library = packages.load(PACKAGE[1])
    (q, k, v), (grad_q, grad_k, grad_v) = map(aligned_rows, qkv), gradients
    # There is no dropout, but AMD's kernels read its random state nevertheless.
    state = torch.zeros(2, dtype=torch.int64, device=q.device) if torch.version.hip else None
    with on_device_of(q):
        library._wrapped_flash_attn_backward(
            dout=aligned_rows(grad),
            q=q,
            k=k,
            v=v,
            out=aligned_rows(out),
            softmax_lse=lse.contiguous(),
            dq=grad_q,
            dk=grad_k,
            dv=grad_v,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=state,
            **_plain(q),
        )


def _plain(q: Tensor) -> dict[str, Any]:
    """Return the arguments that switch off dropout, causality, windows, soft caps and ALiBi; they have no defaults."""
    return {
        "dropout_p": 0.0,
        "softmax_scale": scale_of(q),
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


@constant_when_compiled
def _too_old() -> Reason:
    if not hasattr(packages.load(PACKAGE[1]), "_wrapped_flash_attn_backward"):
        return "this flash-attn is too old: it registers no operators, as versions from 2.7.1 on do"
    return None

"""Attention by the memory-efficient kernels of xformers, as its dispatcher chooses them."""

from __future__ import annotations

from torch import Tensor

from ...dispatch import Reason
from ..call import Call, flash_refuses
from . import packages
from .flash import Triple, aligned_rows, on_device_of, scale_of

PACKAGE = "xformers", "xformers.ops"
AMD = ("gfx90a", "gfx942")


def refuses(call: Call) -> Reason:
    if call.target not in AMD and (call.capability is None or call.capability[0] not in (8, 9)):
        return f"its kernels are for compute capability 8 and 9 and for {', '.join(AMD)}, not {call.target}"
    if call.deterministic:
        return "its backward has no deterministic mode"
    return flash_refuses(call)


def unavailable() -> Reason:
    reason: Reason = packages.refuses(*PACKAGE)
    return reason


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> tuple[Tensor, Tensor]:
    library = packages.load(PACKAGE[1])
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    with on_device_of(q):
        out, lse = library.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale_of(q))
    return out, lse[..., : q.shape[1]]  # one of its kernels pads the rows to a multiple of 32


def attention_backward(
    grad: Tensor, qkv: Triple, key_present: Tensor | None, out: Tensor, lse: Tensor, gradients: Triple
) -> Triple:
    library = packages.load(PACKAGE[1])
    inputs = (aligned_rows(grad), aligned_rows(out), lse.contiguous(), *map(aligned_rows, qkv))
    with on_device_of(grad):
        given: Triple = library.memory_efficient_attention_backward(*inputs, scale=scale_of(grad))
    return given

"""Attention by PyTorch's scaled_dot_product_attention: its flash, cuDNN, memory-efficient and CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...dispatch import Reason
from ..call import HALVES, Call, target_of

# PyTorch's flash kernel is flash-attn 2, which does not use the matrix instructions of Hopper and Blackwell; cuDNN's
# kernels do. MATH supports everything and keeps the scores in memory.
PRIORITY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
PRIORITY_FROM_HOPPER = [SDPBackend.CUDNN_ATTENTION, *PRIORITY[:2], SDPBackend.MATH]


def refuses(call: Call) -> Reason:
    """Return None: every call is supported."""
    return None


def priority(target: str) -> list[SDPBackend]:
    """Return the kernels in order of preference; PyTorch takes the first that supports the call."""
    return PRIORITY_FROM_HOPPER if target.startswith("sm") and int(target[2:]) in (90, 100, 103) else PRIORITY


def kernel_for(call: Call) -> str:
    """Return a description of the kernel that PyTorch will use for the call, according to its documentation."""
    if call.target == "cpu":
        return "the flash kernel for CPUs"
    if call.dtype in HALVES and not call.masked:
        first = priority(call.target)[0] is SDPBackend.CUDNN_ATTENTION and not call.deterministic
        return "cuDNN's kernel" if first and call.head_width <= 128 else "the flash kernel"
    return "the memory-efficient kernel" if call.dtype != torch.float64 else "plain products"


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> Tensor:
    """Compute `attention_eager` by SDPA; its kernels take the transposed views without copies."""
    order = priority(target_of(q.device.type, q.device.index))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(order, set_priority=True):
        if key_present is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        # Absent keys and values may contain NaN, and 0 times NaN is NaN: they become zero. Some kernels return NaN for
        # rows without keys: these attend to all keys, which are zero.
        k, v = (torch.where(key_present[:, None, :, None], tensor, 0.0) for tensor in (k, v))
        mask = key_present | ~key_present.any(1, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)

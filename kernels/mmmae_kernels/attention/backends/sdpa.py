"""Attention by PyTorch's scaled_dot_product_attention: flash, cuDNN and memory-efficient kernels, one for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...dispatch import Reason
from ..call import HALVES, Call, target_of

# Its flash kernel is flash-attn 2, without the matrix instructions that Hopper and Blackwell brought; cuDNN's kernels
# have them. The last computes anything, scores in memory.
PRIORITY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
PRIORITY_FROM_HOPPER = [SDPBackend.CUDNN_ATTENTION, *PRIORITY[:2], SDPBackend.MATH]


def refuses(call: Call) -> Reason:
    """None: it serves every call."""
    return None


def priority(target: str) -> list[SDPBackend]:
    """Its kernels in the order in which they are asked; each refuses what it can't take."""
    return PRIORITY_FROM_HOPPER if target.startswith("sm") and int(target[2:]) in (90, 100, 103) else PRIORITY


def kernel_for(call: Call) -> str:
    """Which of its kernels is the first to take the call, in words, as far as the documentation of PyTorch tells."""
    if call.target == "cpu":
        return "the flash kernel for CPUs"
    if call.dtype in HALVES and not call.masked:
        first = priority(call.target)[0] is SDPBackend.CUDNN_ATTENTION and not call.deterministic
        return "cuDNN's kernel" if first and call.head_width <= 128 else "the flash kernel"
    return "the memory-efficient kernel" if call.dtype != torch.float64 else "plain products"


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> Tensor:
    """See `attention_eager`. Heads are transposed as views: no kernel of SDPA copies for it."""
    order = priority(target_of(q.device.type, q.device.index))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(order, set_priority=True):
        if key_present is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        # What absent keys hold must not matter, and 0 times NaN is NaN. A row without keys would be NaN in some kernels
        # of SDPA: it gets all of them, now zeros.
        k, v = (torch.where(key_present[:, None, :, None], tensor, 0.0) for tensor in (k, v))
        mask = key_present | ~key_present.any(1, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)

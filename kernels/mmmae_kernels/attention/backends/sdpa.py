"""Attention by PyTorch's scaled_dot_product_attention: its flash, cuDNN, memory-efficient and CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...dispatch import HALVES, Reason
from ..call import Call, target_of
from . import torch_cudnn

# PyTorch's flash kernel is flash-attn 2, which does not use the matrix instructions of Hopper and Blackwell; cuDNN's
# kernels do. MATH supports everything and keeps the scores in memory.
PRIORITY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
PRIORITY_FROM_HOPPER = [SDPBackend.CUDNN_ATTENTION, *PRIORITY[:2], SDPBackend.MATH]
CUDNN_WIDTH, FLASH_WIDTH = 128, 256  # largest head widths of PyTorch's kernels
AMD = ("gfx90a", "gfx942", "gfx950")  # on which they are not experimental


def refuses(call: Call) -> Reason:
    """Return None: every call is supported."""
    return None


def priority(target: str) -> list[SDPBackend]:
    """Return the kernels in order of preference; PyTorch takes the first that supports the call."""
    return PRIORITY_FROM_HOPPER if target.startswith("sm") and int(target[2:]) in (90, 100, 103) else PRIORITY


def kernel_for(call: Call) -> str:
    """Return a description of the kernel that PyTorch will use for the call, by the conditions in its source."""
    if call.target == "cpu":
        return "the flash kernel for CPUs"
    if call.capability is None and call.target not in AMD:
        return "plain products, or an experimental kernel where PyTorch has one"
    modern = call.capability is None or call.capability >= (8, 0)
    if modern and call.dtype in HALVES:
        by_cudnn = priority(call.target)[0] is SDPBackend.CUDNN_ATTENTION and not call.deterministic
        if by_cudnn and call.head_width <= CUDNN_WIDTH and call.head_width % 8 == 0:
            return "cuDNN's kernel"
        if call.head_width <= FLASH_WIDTH and not call.masked:
            return "the flash kernel"
    if not _is_memory_efficient(call):
        return "plain products"
    # Newer versions of CUDA leave out the GPUs before Turing.
    builds = "" if modern or call.capability == (7, 5) else ", where PyTorch is built for CUDA 12.6"
    return f"the memory-efficient kernel{builds}"


def _is_memory_efficient(call: Call) -> bool:
    """Return whether PyTorch's memory-efficient kernel supports a call on a GPU."""
    half, capability = call.dtype in HALVES, call.capability
    if call.dtype == torch.float64 or (capability is None and call.head_width > FLASH_WIDTH):
        return False
    if capability is None or capability >= (8, 0):
        return call.head_width % (8 if half else 4) == 0
    if capability < (5, 0) or call.dtype == torch.bfloat16:
        return False
    return capability < (7, 0) or not half or call.head_width % 8 == 0


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None) -> Tensor:
    """Compute `attention_eager` by SDPA; its kernels take the transposed views without copies."""
    order = priority(target_of(q.device.type, q.device.index))
    if order is PRIORITY_FROM_HOPPER and torch_cudnn.cudnn_refuses() is not None:
        order = PRIORITY
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(order, set_priority=True):
        if key_present is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        # Absent keys and values may contain NaN, and 0 times NaN is NaN: they become zero. Some kernels return NaN for
        # rows without keys: these attend to all keys, which are zero.
        k, v = (torch.where(key_present[:, None, :, None], tensor, 0.0) for tensor in (k, v))
        mask = key_present | ~key_present.any(1, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)

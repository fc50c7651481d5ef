"""GELU backward on the GPU, with the activation computed again in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import element_config, launch


def gelu_backward(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient by `hidden`, and GELU of it; contiguous, in one launch."""
    grad, hidden = grad.contiguous(), hidden.contiguous()
    grad_hidden, activated = torch.empty_like(hidden), torch.empty_like(hidden)
    size = hidden.numel()
    arguments = {
        "grad_hidden_ptr": grad_hidden,
        "activated_ptr": activated,
        "grad_ptr": grad,
        "hidden_ptr": hidden,
        "SIZE": size,
    }
    configs = tuple(element_config({"BLOCK": block}, block, hidden.device) for block in (1024, 2048))
    launch(_gelu_backward, lambda c: (triton.cdiv(size, c["BLOCK"]),), arguments, configs)
    return grad_hidden, activated


@triton.jit
def _gelu_backward(
    grad_hidden_ptr,   # [SIZE]
    activated_ptr,     # [SIZE]
    grad_ptr,          # [SIZE]
    hidden_ptr,        # [SIZE]
    SIZE,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE
    hidden = tl.load(hidden_ptr + element, mask=inside, other=0).to(tl.float32)
    grad = tl.load(grad_ptr + element, mask=inside, other=0).to(tl.float32)
    # Hendrycks and Gimpel, "Gaussian error linear units", 2016: x times the standard normal's distribution at x.
    share = 0.5 + 0.5 * tl.erf(hidden * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * hidden * hidden)
    activated = (hidden * share).to(activated_ptr.dtype.element_ty)
    tl.store(activated_ptr + element, activated, mask=inside)
    grad_hidden = (grad * (share + hidden * density)).to(grad_hidden_ptr.dtype.element_ty)
    tl.store(grad_hidden_ptr + element, grad_hidden, mask=inside)

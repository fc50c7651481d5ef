"""GELU on the GPU, and its gradient with the activation computed again in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.launch import element_config, launch
from ..gpu.partial_sums import sum_partials

PROGRAMS = 1024  # at most, along the rows: with a few blocks of channels enough for any GPU
ROWS = 8  # at least, of a program: the partial sum is then a sixteenth of what it writes, or less


def gelu_forward(hidden: Tensor, hidden_bias: Tensor | None) -> Tensor:
    """`gelu(hidden + hidden_bias)`, contiguous, in one launch."""
    hidden = hidden.contiguous()
    activated = torch.empty_like(hidden)
    _launch(_gelu_forward, hidden, hidden_bias, {"activated_ptr": activated})
    return activated


def gelu_backward(grad: Tensor, hidden: Tensor, hidden_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Turn `grad`, contiguous, into that by `hidden`; give GELU and the gradient of `hidden_bias`.

    The latter has no elements without. One launch, two with it; deterministic.
    """
    if not grad.is_contiguous():
        raise ValueError(f"grad has strides {list(grad.stride())}, expected is contiguous memory")
    hidden = hidden.contiguous()
    activated = torch.empty_like(hidden)
    outputs: dict[str, Tensor | None] = {"activated_ptr": activated, "grad_ptr": grad, "partial_ptr": None}
    if hidden_bias is None:
        _launch(_gelu_backward, hidden, None, outputs)
        return activated, hidden.new_empty(0)
    partials = torch.empty(_programs(hidden), 1, hidden.shape[-1], dtype=torch.float32, device=grad.device)
    grad_bias = torch.empty_like(hidden_bias, memory_format=torch.contiguous_format)
    _launch(_gelu_backward, hidden, hidden_bias, {**outputs, "partial_ptr": partials})
    sum_partials(partials, (grad_bias,))
    return activated, grad_bias


def _launch(
    kernel: triton.JITFunction, hidden: Tensor, hidden_bias: Tensor | None, outputs: dict[str, Tensor | None]
) -> None:
    """A program for each block of channels of some rows.

    By one config: backward overwrites what it reads, so that it may not run again to be timed.
    """
    rows, width = _rows(hidden), hidden.shape[-1]
    programs = _programs(hidden)
    arguments = {
        **outputs,
        "hidden_ptr": hidden,
        "bias_ptr": None if hidden_bias is None else hidden_bias.contiguous(),
        "ROWS": rows,
        "H": width,
        "rows_per_program": triton.cdiv(rows, max(programs, 1)),
    }
    config = element_config({"BLOCK_H": 512}, 512, hidden.device)
    launch(kernel, lambda c: (programs, triton.cdiv(width, c["BLOCK_H"])), arguments, (config,))


def _rows(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1] if hidden.numel() else 0


def _programs(hidden: Tensor) -> int:
    """Along the rows."""
    return min(PROGRAMS, -(-_rows(hidden) // ROWS))


@triton.jit
def _normal(x):
    """The share of the normal distribution below x, and its density there."""
    # Hendrycks and Gimpel, "Gaussian error linear units", 2016: GELU is x times the share.
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476), 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _gelu_forward(
    activated_ptr,     # [ROWS, H]
    hidden_ptr,        # [ROWS, H]
    bias_ptr,          # [H] or None
    ROWS, H,
    rows_per_program,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    has_channel = h < H
    bias = tl.zeros((BLOCK_H,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + h, mask=has_channel, other=0).to(tl.float32)
    for row in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, ROWS)):
        place = tl.cast(row, tl.int64) * H + h
        hidden = tl.load(hidden_ptr + place, mask=has_channel, other=0).to(tl.float32) + bias
        share, _ = _normal(hidden)
        tl.store(activated_ptr + place, (hidden * share).to(activated_ptr.dtype.element_ty), mask=has_channel)


@triton.jit
def _gelu_backward(
    activated_ptr,     # [ROWS, H]
    grad_ptr,          # [ROWS, H] of the activation, then of what was activated
    partial_ptr,       # [programs, H] sums of its rows of the latter, float32; None without bias
    hidden_ptr,        # [ROWS, H]
    bias_ptr,          # [H] or None
    ROWS, H,
    rows_per_program,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    has_channel = h < H
    bias, bias_sum = tl.zeros((BLOCK_H,), tl.float32), tl.zeros((BLOCK_H,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + h, mask=has_channel, other=0).to(tl.float32)
    for row in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, ROWS)):
        place = tl.cast(row, tl.int64) * H + h
        hidden = tl.load(hidden_ptr + place, mask=has_channel, other=0).to(tl.float32) + bias
        grad = tl.load(grad_ptr + place, mask=has_channel, other=0).to(tl.float32)
        share, density = _normal(hidden)
        tl.store(activated_ptr + place, (hidden * share).to(activated_ptr.dtype.element_ty), mask=has_channel)
        grad *= share + hidden * density
        bias_sum += grad
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=has_channel)
    if partial_ptr is not None:
        tl.store(partial_ptr + program.to(tl.int64) * H + h, bias_sum, mask=has_channel)

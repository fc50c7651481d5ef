"""GELU on the GPU, and its gradient with the activation computed again in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.config import Launch, element_config
from ..gpu.launch import launch
from ..gpu.partial_sums import sum_partials

PROGRAMS = 1024  # upper limit along the rows; with a few blocks of channels each, enough for any GPU
ROWS = 8  # lower limit of rows a program: its partial sum is then at most a sixteenth of what it writes


def gelu_forward(hidden: Tensor, hidden_bias: Tensor | None) -> Tensor:
    """Return `gelu(hidden + hidden_bias)`, contiguous, in one launch."""
    hidden = hidden.contiguous()
    activated = torch.empty_like(hidden)
    if hidden_bias is not None:
        hidden_bias = hidden_bias.contiguous()
    launch(_describe_forward, (activated, hidden, hidden_bias), _sizes(hidden))
    return activated


def gelu_backward(grad: Tensor, hidden: Tensor, hidden_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Multiply `grad` in place by `gelu'(hidden + hidden_bias)`; return the activation and the gradient of the bias.

    The gradient of the bias is an empty tensor if there is no bias. One launch, two with a bias; deterministic.
    """
    if not grad.is_contiguous():
        raise ValueError(f"grad has strides {list(grad.stride())}, expected a contiguous tensor")
    hidden = hidden.contiguous()
    activated = torch.empty_like(hidden)
    numbers = _sizes(hidden)
    if hidden_bias is None:
        launch(_describe_backward, (activated, grad, None, hidden, None), numbers)
        return activated, hidden.new_empty(0)
    _, width, programs = numbers
    partials = grad.new_empty(programs, 1, width, dtype=torch.float32)
    grad_bias = hidden_bias.new_empty(width)
    launch(_describe_backward, (activated, grad, partials, hidden, hidden_bias.contiguous()), numbers)
    sum_partials(partials, (grad_bias,))
    return activated, grad_bias


def _sizes(hidden: Tensor) -> tuple[int, int, int]:
    """Return the number of rows, their width, and the number of programs along the rows."""
    width, count = hidden.shape[-1], hidden.numel()
    rows = count // width if count else 0
    return rows, width, min(PROGRAMS, -(-rows // ROWS))


def _describe_forward(target: str, rows: int, width: int, programs: int) -> Launch:
    return _describe(_gelu_forward, target, rows, width, programs)


def _describe_backward(target: str, rows: int, width: int, programs: int) -> Launch:
    return _describe(_gelu_backward, target, rows, width, programs)


def _describe(kernel: triton.JITFunction, target: str, rows: int, width: int, programs: int) -> Launch:
    """Describe a launch with one program for each block of channels and group of rows.

    There is only one config: backward overwrites its input, so autotuning can't run it repeatedly.
    """
    arguments = {"ROWS": rows, "H": width, "rows_per_program": triton.cdiv(rows, max(programs, 1))}
    config = element_config({"BLOCK_H": 512}, 512, target)
    return Launch(kernel, lambda c: (programs, triton.cdiv(width, c["BLOCK_H"])), arguments, (config,))


@triton.jit
def _normal(x):
    """Return the cumulative distribution and the density of the standard normal distribution at x."""
    # Hendrycks and Gimpel, "Gaussian error linear units", 2016: GELU is x times the cumulative distribution.
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
        cumulative, _ = _normal(hidden)
        tl.store(activated_ptr + place, (hidden * cumulative).to(activated_ptr.dtype.element_ty), mask=has_channel)


@triton.jit
def _gelu_backward(
    activated_ptr,     # [ROWS, H]
    grad_ptr,          # [ROWS, H] gradient of the activation, overwritten by that of hidden
    partial_ptr,       # [programs, H] float32, each program's sum of the gradient of hidden; None without bias
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
        cumulative, density = _normal(hidden)
        tl.store(activated_ptr + place, (hidden * cumulative).to(activated_ptr.dtype.element_ty), mask=has_channel)
        grad *= cumulative + hidden * density
        bias_sum += grad
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=has_channel)
    if partial_ptr is not None:
        tl.store(partial_ptr + program.to(tl.int64) * H + h, bias_sum, mask=has_channel)

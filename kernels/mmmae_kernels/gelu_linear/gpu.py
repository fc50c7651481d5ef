"""GELU on the GPU, and its gradient with the activation computed again in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.config import Launch, element_config
from ..gpu.groups import COUNTERS, GROUP, TILE, rows_of_a_program, stacked
from ..gpu.launch import launch
from ..gpu.partial_sums import end_sums
from .op import BLOCK_H

PROGRAMS = 1024  # upper limit along the rows in forward; with a few blocks of channels each, enough for any GPU
ROWS = 2  # lower limit of rows a program in forward: small batches then fill a GPU, and the bias is read half as often
TOGETHER = TILE // BLOCK_H  # rows that a program has in registers at once in backward


def gelu_forward(hidden: Tensor, hidden_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return `gelu(hidden + hidden_bias)`, contiguous, in one launch, and counters for backward (None without bias).

    The bias may be a stack `[W, H]`: then the first of W equal parts of the rows has the first bias and so on.
    """
    hidden = hidden.contiguous()
    activated, counters = torch.empty_like(hidden), None
    width, rows, biases = hidden.shape[-1], _rows(hidden), stacked(hidden_bias)
    if hidden_bias is not None:
        hidden_bias = hidden_bias.contiguous()
        counters = hidden.new_empty(biases * -(-width // BLOCK_H) * COUNTERS, dtype=torch.int32)
    launch(_describe_forward, (activated, counters, hidden, hidden_bias), (rows, biases, width))
    return activated, counters


def gelu_backward(
    grad: Tensor, hidden: Tensor, hidden_bias: Tensor | None, counters: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Multiply `grad` in place by `gelu'(hidden + hidden_bias)`; return the activation and the gradient of the bias.

    The gradient of the bias is None if there is no bias. One launch; deterministic. For stacks of biases see
    `gelu_forward`.
    """
    if not grad.is_contiguous():
        raise ValueError(f"grad has strides {list(grad.stride())}, expected a contiguous tensor")
    hidden = hidden.contiguous()
    activated = torch.empty_like(hidden)
    width, rows, biases = hidden.shape[-1], _rows(hidden), stacked(hidden_bias)
    rows_per_program = rows_of_a_program(rows, TOGETHER)
    programs = -(-(rows // biases) // rows_per_program)
    partials = grad_bias = None
    if hidden_bias is not None:
        hidden_bias = hidden_bias.contiguous()
        partials = grad.new_empty(biases, programs, width, dtype=torch.float32)
        # Without rows nothing is launched.
        grad_bias = (hidden_bias.new_empty if rows else hidden_bias.new_zeros)(hidden_bias.shape)
    tensors = activated, grad, grad_bias, partials, counters, hidden, hidden_bias
    launch(_describe_backward, tensors, (rows, biases, width, rows_per_program, programs))
    return activated, grad_bias


def _rows(hidden: Tensor) -> int:
    count = hidden.numel()
    return count // hidden.shape[-1] if count else 0


def _describe_forward(target: str, rows: int, biases: int, width: int) -> Launch:
    rows_of_bias = rows // biases
    programs = min(triton.cdiv(PROGRAMS, biases), triton.cdiv(rows_of_bias, ROWS))
    arguments = {
        "ROWS": rows_of_bias,
        "H": width,
        "rows_per_program": triton.cdiv(rows_of_bias, max(programs, 1)),
        "COUNTERS": COUNTERS,
    }
    config = element_config({"BLOCK_H": BLOCK_H}, BLOCK_H, target)
    return Launch(_gelu_forward, lambda c: (programs, triton.cdiv(width, BLOCK_H), biases), arguments, (config,))


def _describe_backward(
    target: str, rows: int, biases: int, width: int, rows_per_program: int, programs: int
) -> Launch:
    """Describe a launch with one config: it overwrites its input, so autotuning can't run it repeatedly."""
    arguments = {"ROWS": rows // biases, "H": width, "rows_per_program": rows_per_program}
    constants = {"BLOCK_R": TOGETHER, "BLOCK_H": BLOCK_H, "GROUP": GROUP, "COUNTERS": COUNTERS}
    config = element_config(constants, TILE, target)
    return Launch(_gelu_backward, lambda c: (programs, triton.cdiv(width, BLOCK_H), biases), arguments, (config,))


@triton.jit
def _normal(x):
    """Return the cumulative distribution and the density of the standard normal distribution at x."""
    # Hendrycks and Gimpel, "Gaussian error linear units", 2016: GELU is x times the cumulative distribution.
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476), 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _gelu_forward(
    activated_ptr,     # [W*ROWS, H]
    counter_ptr,       # [W, blocks of H, COUNTERS] int32, zeroed for backward, or None
    hidden_ptr,        # [W*ROWS, H]
    bias_ptr,          # [W, H] or None
    ROWS, H,
    rows_per_program,
    COUNTERS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program, which = tl.program_id(0), tl.program_id(2)
    first = which * ROWS + program * rows_per_program
    end = tl.minimum(first + rows_per_program, (which + 1) * ROWS)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    has_channel = h < H
    bias = tl.zeros((BLOCK_H,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + which * H + h, mask=has_channel, other=0).to(tl.float32)
    for row in range(first, end):
        place = tl.cast(row, tl.int64) * H + h
        hidden = tl.load(hidden_ptr + place, mask=has_channel, other=0).to(tl.float32) + bias
        cumulative, _ = _normal(hidden)
        tl.store(activated_ptr + place, (hidden * cumulative).to(activated_ptr.dtype.element_ty), mask=has_channel)
    if counter_ptr is not None:
        counter = tl.arange(0, COUNTERS)
        is_first = program + 0 * counter == 0  # a mask of the block's shape, as the interpreter of Triton 3.9 asks for
        counters = counter_ptr + (which * tl.num_programs(1) + tl.program_id(1)) * COUNTERS
        tl.store(counters + counter, tl.zeros((COUNTERS,), tl.int32), mask=is_first)


@triton.jit
def _gelu_backward(
    activated_ptr,     # [W*ROWS, H]
    grad_ptr,          # [W*ROWS, H] gradient of the activation, overwritten by that of hidden
    grad_bias_ptr,     # [W, H], or None without bias
    partial_ptr,       # [W, programs, H] float32, each program's part of grad_bias, or None
    counter_ptr,       # [W, blocks of H, COUNTERS] int32 or None
    hidden_ptr,        # [W*ROWS, H]
    bias_ptr,          # [W, H] or None
    ROWS, H,
    rows_per_program,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr, COUNTERS: tl.constexpr,
):
    program, which = tl.program_id(0), tl.program_id(2)
    first = which * ROWS + program * rows_per_program
    end = tl.minimum(first + rows_per_program, (which + 1) * ROWS)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    has_channel = h < H
    bias_sum = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    bias = tl.zeros((BLOCK_H,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + which * H + h, mask=has_channel, other=0).to(tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        place = row.to(tl.int64)[:, None] * H + h[None, :]
        mask = (row < end)[:, None] & has_channel[None, :]
        hidden = tl.load(hidden_ptr + place, mask=mask, other=0).to(tl.float32) + bias[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0).to(tl.float32)
        cumulative, density = _normal(hidden)
        tl.store(activated_ptr + place, (hidden * cumulative).to(activated_ptr.dtype.element_ty), mask=mask)
        grad *= cumulative + hidden * density
        bias_sum += grad
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        partial_ptr += tl.cast(which, tl.int64) * tl.num_programs(0) * H
        tl.store(partial_ptr + program.to(tl.int64) * H + h, tl.sum(bias_sum, axis=0), mask=has_channel)
        counters = counter_ptr + (which * tl.num_programs(1) + tl.program_id(1)) * COUNTERS
        end_sums(grad_bias_ptr + which * H, None, None, partial_ptr, counters, H, h, has_channel, 1, GROUP)

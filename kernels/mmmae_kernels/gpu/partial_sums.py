"""Second step of a deterministic reduction: adds up the partial sums of a kernel's programs in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .config import Launch, element_config, next_power_of_2
from .launch import launch


def sum_partials(partials: Tensor, outputs: Sequence[Tensor]) -> None:
    """Write the sums over the first axis of `partials [S, len(outputs), ...]`, float32, into up to three outputs."""
    first, second, third = (*outputs, None, None)[:3]
    numbers = partials.shape[0], outputs[0].numel(), len(outputs)
    launch(_describe, (first, second, third, partials), numbers)


def _describe(target: str, count: int, width: int, outputs: int) -> Launch:
    # A tile of 1024 numbers is 8 a thread: two loads of 16 bytes in flight. For long sums it is tall, so that a program
    # does not wait for many loads one after another.
    rows = min(64, next_power_of_2(count))
    config = element_config({"BLOCK_S": rows, "BLOCK": 1024 // rows}, 1024, target)
    arguments = {"PARTIALS": count, "WIDTH": width}
    return Launch(_sum_partials, lambda c: (triton.cdiv(width, c["BLOCK"]), outputs), arguments, (config,))


@triton.jit
def _sum_partials(
    first_ptr,         # [WIDTH]
    second_ptr,        # [WIDTH] or None
    third_ptr,         # [WIDTH] or None
    partial_ptr,       # [PARTIALS, outputs, WIDTH] float32
    PARTIALS, WIDTH,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    which = tl.program_id(1)
    sums = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for start in range(0, PARTIALS, BLOCK_S):
        partial = start + tl.arange(0, BLOCK_S)
        place = (partial.to(tl.int64) * tl.num_programs(1) + which) * WIDTH
        mask = (partial < PARTIALS)[:, None] & inside[None, :]
        sums += tl.load(partial_ptr + place[:, None] + column[None, :], mask=mask, other=0)
    total = tl.sum(sums, axis=0)
    if which == 0:
        tl.store(first_ptr + column, total.to(first_ptr.dtype.element_ty), mask=inside)
    if second_ptr is not None and which == 1:
        tl.store(second_ptr + column, total.to(second_ptr.dtype.element_ty), mask=inside)
    if third_ptr is not None and which == 2:
        tl.store(third_ptr + column, total.to(third_ptr.dtype.element_ty), mask=inside)

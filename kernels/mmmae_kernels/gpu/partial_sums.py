"""Deterministic sums over many programs: each stores a partial sum, and these are added up in a fixed order.

`end_sums` does that inside the kernel that made the partial sums, `sum_partials` in a launch of its own.
"""

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
def end_sums(
    first_ptr,         # [WIDTH]
    second_ptr,        # [WIDTH], or None if SUMS < 2
    third_ptr,         # [WIDTH], or None if SUMS < 3
    partial_ptr,       # [programs, SUMS, WIDTH] float32, which this program has stored its part of
    counter_ptr,       # [2*GROUP] int32, all zero before and after
    WIDTH,
    column, inside,    # [BLOCK] columns that this program has summed, and whether they are less than WIDTH
    SUMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Add up the partial sums of all programs of grid axis 0, at most GROUP**2, at the end of the kernel.

    The last program of a group to come here adds up its group, and the last of these adds up all groups. The counters
    only decide which program that is: the order of the sums is that of the program numbers, so that results repeat.

    The counters are zeroed by the kernel of the forward pass, which returns them with what it saves for backward, and
    are zero again afterwards. So a backward pass may run several times (retain_graph), each forward pass has counters
    of its own on whichever stream or in whichever CUDA graph it runs, and whatever copies saved tensors may copy them.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    leader = program // GROUP * GROUP
    members = tl.minimum(programs - leader, GROUP)
    if _is_last(counter_ptr + program // GROUP, members):
        at_leader = partial_ptr + leader.to(tl.int64) * SUMS * WIDTH + column
        for which in tl.static_range(SUMS):
            at = at_leader + which * WIDTH
            tl.store(at, _sum_of_group(at, SUMS * WIDTH, members, inside, GROUP), mask=inside)
        groups = tl.cdiv(programs, GROUP)
        if _is_last(counter_ptr + GROUP, groups):
            for which in tl.static_range(SUMS):
                at = partial_ptr + which * WIDTH + column
                total = _sum_of_group(at, GROUP * SUMS * WIDTH, groups, inside, GROUP)
                if which == 0:
                    tl.store(first_ptr + column, total.to(first_ptr.dtype.element_ty), mask=inside)
                elif which == 1:
                    tl.store(second_ptr + column, total.to(second_ptr.dtype.element_ty), mask=inside)
                else:
                    tl.store(third_ptr + column, total.to(third_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _is_last(counter_ptr, count):
    """Count this program and return whether it is the last one of `count`, which then sees what the others stored."""
    # One thread counts for the program: the others' stores have to come before it. With `acq_rel` it publishes them,
    # and the last program sees those of all programs before it.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if is_last:
        tl.store(counter_ptr, 0)
        tl.debug_barrier()  # and so does every thread of it
    return is_last


@triton.jit
def _sum_of_group(at, stride, count, inside, GROUP: tl.constexpr):
    """Return the sum of `count` rows, the first of which is `at`, read past the multiprocessor's own cache."""
    total = tl.zeros(at.shape, tl.float32)
    AT_ONCE: tl.constexpr = GROUP if at.shape[0] <= 1024 else GROUP // 4  # 64 registers a thread at most
    for first in range(0, GROUP, AT_ONCE):
        member = first + tl.arange(0, AT_ONCE)
        rows = at[None, :] + member.to(tl.int64)[:, None] * stride
        mask = (member < count)[:, None] & inside[None, :]
        total += tl.sum(tl.load(rows, mask=mask, other=0, cache_modifier=".cg"), axis=0)
    return total


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

"""`wgmma`: asynchronous matrix products of the four warps of a warpgroup (sm_90).

A product is computed when it begins. From then until its commit group is waited for, no other instruction may use the
registers of its result, and nobody may write to the shared memory that it reads: so nobody can tell that it was early.
"""

import re
from collections.abc import Callable

import numpy as np

from tests.emulator.ptx.decoder import Decoder
from tests.emulator.ptx.errors import Divergence
from tests.emulator.ptx.matrix_descriptors import layout_of, matrices_in, start_of, unit_offsets
from tests.emulator.ptx.number_types import Array, Mask, numbers_in_words
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.state import State, Step, register_list
from tests.emulator.ptx.warpgroups import THREADS, WARPS

_ROWS = 64  # of A and of the result
_SIZES = {"f16": 2, "bf16": 2, "tf32": 4}


def _bind(state: State, instruction: Instruction) -> Step:
    groups = state.warpgroups
    if instruction.has("mma_async"):
        return _bind_product(state, instruction)
    if instruction.has("fence"):
        return lambda mask: groups.fence(groups.at(instruction, mask))
    if instruction.has("commit_group"):
        return lambda mask: groups.commit(groups.at(instruction, mask))
    keep = int(instruction.operands[0])
    return lambda mask: groups.wait(keep, groups.at(instruction, mask))


def _bind_product(state: State, instruction: Instruction) -> Step:
    shape = next((found for each in instruction.modifiers if (found := re.fullmatch(r"m64n(\d+)k(\d+)", each))), None)
    if shape is None or len(instruction.types) != 3:
        raise instruction.refused("form")
    to, ptx_type, other = instruction.types
    columns, inner = int(shape[1]), int(shape[2])
    operands, registers = instruction.operands, state.registers
    from_registers = operands[1].startswith("{")
    halves = ptx_type != "tf32"
    expected = 6 + halves * (2 - from_registers)  # the flags for transposed operands come last
    if to != "f32" or ptx_type != other or inner * _SIZES[ptx_type] != 32 or len(operands) != expected:
        raise instruction.refused("form")
    signs = int(operands[4]) * int(operands[5])
    flags = [int(operand) != 0 for operand in operands[6:]]
    names = register_list(operands[0])
    out = registers.rows(names, 32)
    if len(out) != columns // 2 or abs(signs) != 1:
        raise instruction.refused("form")
    scale = registers.read(operands[3], "pred")
    read_a = (
        _bind_fragments(state, instruction, ptx_type, inner)
        if from_registers
        else _bind_matrix(state, instruction, operands[1], _ROWS, inner, ptx_type, flags[0] if flags else False)
    )
    read_b = _bind_matrix(state, instruction, operands[2], columns, inner, ptx_type, flags[-1] if flags else False)
    results, sources = frozenset(names), frozenset(register_list(operands[1])) if from_registers else frozenset()
    accumulator = f"{shape[0]} {operands[0]}"
    file = registers.files[32]

    def step(mask: Mask) -> None:
        groups = state.warpgroups.at(instruction, mask)
        state.in_flight.check(sources, instruction, mask)
        state.in_flight.check(results, instruction, mask, accumulator)
        state.warpgroups.require_fence(results, groups, instruction, mask)
        (a, lent_a), (b, lent_b) = read_a(groups), read_b(groups)
        product = a @ b.swapaxes(1, 2) * signs  # [groups, rows, columns]
        # Register 4 j + 2 h + c of lane 4 g + t of warp w: row 16 w + 8 h + g, column 8 j + 2 t + c.
        product = product.reshape(-1, WARPS, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        product = product.reshape(len(out), len(groups), THREADS)
        bits = file[out].reshape(len(out), -1, THREADS)
        added = scale.reshape(-1, THREADS)[groups]
        before = np.where(added, bits[:, groups].view(np.float32), np.float32(0))
        bits[:, groups] = (product + before).astype(np.float32).view(np.uint32)
        file[out] = bits.reshape(len(out), -1)
        threads = np.ones(state.threads, bool) if mask is True else mask
        flight = state.in_flight.begin(results, threads, accumulator, "its wgmma was not waited for")
        state.warpgroups.begin(groups, lent_a + lent_b, flight)

    return step


_Read = Callable[[Array], tuple[Array, list[Array]]]  # of warpgroups: the matrices, and shared memory that is lent


def _bind_matrix(
    state: State, instruction: Instruction, operand: str, rows: int, inner: int, ptx_type: str, transposed: bool
) -> _Read:
    """Return a function that reads a matrix for each warpgroup by its descriptor."""
    source = state.registers.read(operand, "u64")

    def read(groups: Array) -> tuple[Array, list[Array]]:
        descriptors = source.reshape(-1, THREADS)[groups]
        if (descriptors != descriptors[:, :1]).any():
            raise Divergence(f"{instruction.text}: the threads of a warpgroup have different descriptors")
        layouts = np.unique(descriptors[:, 0] >> np.uint64(14))
        layout = layout_of(int(layouts[0]) << 14, blackwell=False)
        if layout is None or len(layouts) > 1:
            raise instruction.refused(f"descriptor {int(descriptors[0, 0]):#x}")
        offset = unit_offsets(start_of(descriptors[:, 0]), layout, rows, inner, _SIZES[ptx_type], transposed)
        units, index = state.shared.lend(offset, groups * THREADS, WARPS, instruction)
        return matrices_in(units, ptx_type, transposed), [index]

    return read


def _bind_fragments(state: State, instruction: Instruction, ptx_type: str, inner: int) -> _Read:
    """Return a function that reads A from registers, which hold it as those of `mma` do."""
    rows = state.registers.rows(register_list(instruction.operands[1]), 32)
    file = state.registers.files[32]
    if len(rows) != 4:
        raise instruction.refused("form")

    def read(groups: Array) -> tuple[Array, list[Array]]:
        numbers = numbers_in_words(file[rows], ptx_type).reshape(2, 2, -1, WARPS, 8, inner // 2)
        return numbers.transpose(2, 3, 1, 4, 0, 5).reshape(-1, _ROWS, inner)[groups], []

    return read


_SHAPES = " ".join(f"m64n{columns}k{inner}" for columns in range(8, 257, 8) for inner in (8, 16))

DECODERS = {
    "wgmma": Decoder(
        _bind,
        f"fence commit_group wait_group mma_async sync aligned {_SHAPES}",
        "f32 f16 bf16 tf32",
        (0, 1, 6, 7, 8),
        (0, 3),
    )
}

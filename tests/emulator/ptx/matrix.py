"""Tensor cores: `mma`, and `ldmatrix` and `stmatrix`, which bring its operands to and from shared memory.

In all forms of `mma.m16n8` lane 4 * g + t of a warp holds, of A, rows g and g + 8, of B, column g, and of the result,
rows g and g + 8 at columns 2 * t and 2 * t + 1. The numbers in one register are neighbours along the inner dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.emulator.ptx.decoder import Decoder
from tests.emulator.ptx.number_types import PER_WORD, Array, Mask, numbers_in_words
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.state import SHARED_WINDOW, State, Step, bind_address, register_list

_SHAPES = ("m16n8k8", "m16n8k16", "m16n8k32")


class _Fragments(NamedTuple):
    """Registers of one `mma`, by row of the register file."""

    out: Array
    a: Array
    b: Array
    c: Array


def bind_mma(state: State, instructions: Sequence[Instruction]) -> list[Step]:
    """Return steps for consecutive `mma` instructions; those that need no result of each other share a step.

    All must have the same form and no predicate.
    """
    levels: list[list[_Fragments]] = []
    written: dict[int, int] = {}  # register: first level after its last write
    read: dict[int, int] = {}  # register: level of its last read
    for fragments in (_fragments(state, instruction) for instruction in instructions):
        used = {*fragments.a.tolist(), *fragments.b.tolist(), *fragments.c.tolist()}
        changed = set(fragments.out.tolist())
        level = max([0, *(written.get(row, 0) for row in used | changed), *(read.get(row, 0) for row in changed)])
        written.update((row, level + 1) for row in changed)
        read.update((row, max(level, read.get(row, 0))) for row in used)
        levels += [[]] * (level == len(levels))
        levels[level] = [*levels[level], fragments]
    return [_bind_level(state, instructions[0], level) for level in levels]


def may_follow(first: Instruction, second: Instruction) -> bool:
    """Return whether `bind_mma` may take both instructions in one call."""
    same = (first.opcode, first.modifiers, first.types) == (second.opcode, second.modifiers, second.types)
    return same and first.opcode == "mma" and first.predicate is None and second.predicate is None


def _fragments(state: State, instruction: Instruction) -> _Fragments:
    shape = instruction.one_of(*_SHAPES)
    if shape is None or not instruction.has("row") or not instruction.has("col"):
        raise instruction.refused("shape")
    names = [register_list(operand) for operand in instruction.operands]
    to, a_type, b_type, c_type = instruction.types
    eighth = int(shape.split("k")[1]) // (4 * PER_WORD[a_type])
    results = 2 if to == "f16" else 4
    kinds = ("s8", "u8") if a_type in ("s8", "u8") else (a_type,)
    if [len(each) for each in names] != [results, 2 * eighth, eighth, results] or to != c_type or b_type not in kinds:
        raise instruction.refused("form")
    if (a_type in ("s8", "u8")) != (to == "s32"):
        raise instruction.refused("types")
    return _Fragments(*(state.registers.rows(each, 32) for each in names))


def _distinct(rows: list[Array]) -> tuple[Array, list[int]]:
    """Return the distinct rows, [n, registers], and for each given row its index among them."""
    numbers: dict[tuple[int, ...], int] = {}
    which = [numbers.setdefault(tuple(row.tolist()), len(numbers)) for row in rows]
    return np.array(list(numbers)), which


def _bind_level(state: State, instruction: Instruction, level: list[_Fragments]) -> Step:
    to, a_type, b_type, _ = instruction.types
    warps, registers = state.warps, state.registers.files[32]
    a_rows, a_which = _distinct([fragments.a for fragments in level])
    b_rows, b_which = _distinct([fragments.b for fragments in level])
    c_rows = np.stack([fragments.c for fragments in level])
    out_rows = np.stack([fragments.out for fragments in level])
    a_count, b_count = len(a_rows), len(b_rows)
    eighths, count = b_rows.shape[1], len(level)
    inner = eighths * 4 * PER_WORD[a_type]
    chunk = 4 * PER_WORD[a_type]
    every_pair = a_which == [i // b_count for i in range(count)] and b_which == [i % b_count for i in range(count)]
    outer = every_pair or 2 * count >= a_count * b_count

    def products() -> Array:
        """Return the products, [count, warps, 16, 8]; exact where a sum fits in float64's 53 bits."""
        a = numbers_in_words(registers[a_rows], a_type).reshape(a_count, eighths, 2, warps, 8, chunk)
        b = numbers_in_words(registers[b_rows], b_type).reshape(b_count, eighths, warps, 8, chunk)
        if outer:
            left = a.transpose(3, 0, 2, 4, 1, 5).reshape(warps, a_count * 16, inner)
            right = b.transpose(2, 0, 3, 1, 4).reshape(warps, b_count * 8, inner)
            all_pairs = (left @ right.transpose(0, 2, 1)).reshape(warps, a_count, 16, b_count, 8)
            return all_pairs[:, a_which, :, b_which]
        by_mma = a.transpose(0, 3, 2, 4, 1, 5).reshape(a_count, warps, 16, inner)
        columns = b.transpose(0, 2, 3, 1, 4).reshape(b_count, warps, 8, inner)
        return np.asarray(by_mma[a_which] @ columns[b_which].transpose(0, 1, 3, 2))

    # A register holds a result (f32, s32) or two neighbours (f16): the axes are (mma, row half, column, warp, g, t), or
    # those with the column last.
    to_registers = (0, 2, 1, 3, 4, 5) if to == "f16" else (0, 2, 5, 1, 3, 4)
    c_dtype = np.dtype({"f16": np.float16, "f32": np.float32, "s32": np.int32}[to])

    def step(mask: Mask) -> None:
        state.whole_warps(instruction, mask)
        split = products().reshape(count, warps, 2, 8, 4, 2).transpose(to_registers)
        total = split + registers[c_rows].view(c_dtype).reshape(split.shape)
        if to == "s32":
            if instruction.has("satfinite"):
                total = np.clip(total, -(2**31), 2**31 - 1)
            bits = total.astype(np.int64).astype(np.int32).view(np.uint32)
        else:
            bits = np.ascontiguousarray(total.astype(c_dtype)).view(np.uint32)
        results = bits.reshape(out_rows.shape[0], out_rows.shape[1], state.threads)
        registers[out_rows] = results if mask is True else np.where(mask, results, registers[out_rows])

    return step


def _mma(state: State, instruction: Instruction) -> Step:
    (step,) = bind_mma(state, [instruction])
    return step


def _matrix_count(instruction: Instruction, operand: str) -> tuple[int, list[str]]:
    names = register_list(operand)
    count = int((instruction.one_of("x1", "x2", "x4") or "x0")[1:])
    if count != len(names) or not instruction.has("m8n8") or instruction.types != ("b16",):
        raise instruction.refused("form")
    return count, names


def _load_matrix(state: State, instruction: Instruction) -> Step:
    """Bind `ldmatrix`.

    Lane 8 * i + r of a warp holds the address of row r of matrix i; lane l gets two neighbours of row l // 4 of each.
    """
    count, names = _matrix_count(instruction, instruction.operands[0])
    addresses = bind_address(state, instruction, instruction.operands[1], SHARED_WINDOW)
    outs = [state.registers.write(name, "u32") for name in names]
    gives_address = np.arange(state.threads) % 32 < 8 * count
    transposed = instruction.has("trans")

    def step(mask: Mask) -> None:
        state.whole_warps(instruction, mask)
        rows = gives_address if mask is True else gives_address & mask
        if mask is True and count == 4:
            rows = True
        loaded = state.shared.load(addresses(rows), 16, instruction, rows)
        matrices = loaded.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        words = matrices.view(np.uint32).reshape(-1, count, 32)
        for at, out in enumerate(outs):
            if mask is True:
                np.copyto(out.reshape(-1, 32), words[:, at])
            else:
                out[mask] = words[:, at].reshape(-1)

    return step


def _store_matrix(state: State, instruction: Instruction) -> Step:
    """Bind `stmatrix`, the inverse of `_load_matrix`."""
    count, names = _matrix_count(instruction, instruction.operands[1])
    addresses = bind_address(state, instruction, instruction.operands[0], SHARED_WINDOW)
    sources = [state.registers.read(name, "u32") for name in names]
    gives_address = np.arange(state.threads) % 32 < 8 * count
    transposed = instruction.has("trans")

    def step(mask: Mask) -> None:
        state.whole_warps(instruction, mask)
        rows = gives_address if mask is True else gives_address & mask
        words = np.stack(sources if mask is True else [source[mask] for source in sources], 0)
        matrices = words.view(np.uint16).reshape(count, -1, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        values = np.ascontiguousarray(matrices.swapaxes(0, 1)).view(np.complex128).reshape(-1)
        state.shared.store(addresses(rows), values, instruction, rows)

    return step


_MATRIX = "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"

DECODERS = {
    "mma": Decoder(
        _mma,
        "sync aligned row col satfinite " + " ".join(_SHAPES),
        "f16 bf16 tf32 f32 s8 u8 s32",
        (4,),
        (4,),
    ),
    "ldmatrix": Decoder(_load_matrix, _MATRIX, "b16", (2,)),
    "stmatrix": Decoder(_store_matrix, _MATRIX, "b16", (2,)),
}

"""`tcgen05`: tensor memory, and the matrix products that one thread begins for its block (sm_100).

A product is computed when it begins; see `TensorMemory` for what keeps anybody from noticing.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.emulator.ptx.decoder import Decoder
from tests.emulator.ptx.errors import EmulatorError, OutOfBounds
from tests.emulator.ptx.matrix_descriptors import layout_of, matrices_in, start_of, unit_offsets
from tests.emulator.ptx.number_types import Array, Mask, numbers_in_words
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.state import SHARED_WINDOW, State, Step, bind_address, register_list
from tests.emulator.ptx.tensor_memory import LANES, TOGETHER, Cells, Product

_TYPES = {"kind::f16": {0: "f16", 1: "bf16"}, "kind::tf32": {2: "tf32"}}  # by their numbers in a descriptor
_ROW_BYTES = 32  # of an operand, along the dimension that one product sums over


def _bind(state: State, instruction: Instruction) -> Step:
    name = instruction.modifiers[0]
    if name not in _BIND:
        raise instruction.refused("form")
    return _BIND[name](state, instruction)


def _blocks(state: State, instruction: Instruction, mask: Mask) -> tuple[Array, Array]:
    """Return the threads of a mask and their blocks; of each block there must be one warp."""
    state.whole_warps(instruction, mask)
    threads = state.threads_in(mask)
    blocks = threads // state.threads_per_block
    if len(np.unique(blocks)) * 32 != len(threads):
        raise EmulatorError(f"{instruction.text}: several warps of a block run it, expected one")
    return threads, blocks


def _allocate(state: State, instruction: Instruction) -> Step:
    address = bind_address(state, instruction, instruction.operands[0], SHARED_WINDOW)
    columns = int(instruction.operands[1], 0)

    def step(mask: Mask) -> None:
        _, blocks = _blocks(state, instruction, mask)
        first = {
            block: state.tensor_memory.allocate(block, columns, instruction) for block in np.unique(blocks).tolist()
        }
        values = np.array([first[block] for block in blocks.tolist()], np.uint32)
        state.shared.store(address(mask), values, instruction, mask)

    return step


def _relinquish(state: State, instruction: Instruction) -> Step:
    def step(mask: Mask) -> None:
        for block in np.unique(_blocks(state, instruction, mask)[1]).tolist():
            state.tensor_memory.relinquish(block)

    return step


def _free(state: State, instruction: Instruction) -> Step:
    first = state.registers.read(instruction.operands[0], "u32")
    columns = int(instruction.operands[1], 0)

    def step(mask: Mask) -> None:
        threads, blocks = _blocks(state, instruction, mask)
        for thread, block in zip(threads[::32].tolist(), blocks[::32].tolist(), strict=True):
            state.tensor_memory.free(block, int(first[thread]), columns, instruction)

    return step


def _bind_cells(
    state: State, instruction: Instruction, operand: str, split: str, count: int
) -> Callable[[Mask], Cells]:
    """Return a function of the mask that gives the words [count, threads] that a load or store moves."""
    shape = instruction.one_of("32x32b", "16x32bx2")
    if shape is None or not instruction.has(f"x{count}") or (shape == "16x32bx2") != bool(split):
        raise instruction.refused("form")
    address = bind_address(state, instruction, operand)
    between = int(split, 0) if split else 0

    def cells(mask: Mask) -> Cells:
        state.whole_warps(instruction, mask)
        threads, first = state.threads_in(mask), address(mask)
        lane, column, within = first >> 16, first & 0xFFFF, threads % 32
        elsewhere = lane // 32 != threads // 32 % 4
        if elsewhere.any():
            why = "lanes of tensor memory that another warp has to access"
            state.faults.stop(OutOfBounds, instruction, mask, elsewhere, first, why)
        if shape == "32x32b":
            lane = lane + within
        else:  # two halves of 16 lanes: the second half of the warp has other columns
            lane, column = lane + within % 16, column + within // 16 * between
        block = threads // state.threads_per_block
        return Cells(block[None], lane[None], column + np.arange(count)[:, None])

    return cells


def _load(state: State, instruction: Instruction) -> Step:
    operands = instruction.operands
    rows = state.registers.rows(register_list(operands[0]), 32)
    cells = _bind_cells(state, instruction, operands[1], "".join(operands[2:]), len(rows))
    file, names = state.registers.files[32], register_list(operands[0])

    def step(mask: Mask) -> None:
        threads = state.threads_in(mask)
        file[rows[:, None], threads] = state.tensor_memory.load(cells(mask), threads, instruction, mask)
        loaded = np.ones(state.threads, bool) if mask is True else mask
        state.in_flight.begin(names, loaded, "", "its tcgen05.ld was not waited for")

    return step


def _store(state: State, instruction: Instruction) -> Step:
    operands = instruction.operands
    rows = state.registers.rows(register_list(operands[-1]), 32)
    cells = _bind_cells(state, instruction, operands[0], "".join(operands[1:-1]), len(rows))
    file = state.registers.files[32]

    def step(mask: Mask) -> None:
        threads = state.threads_in(mask)
        state.tensor_memory.store(cells(mask), file[rows[:, None], threads], threads, instruction, mask)

    return step


def _wait_for_loads(state: State, instruction: Instruction) -> Step:
    def step(mask: Mask) -> None:
        state.whole_warps(instruction, mask)
        state.tensor_memory.wait(True, mask)
        state.in_flight.land_loads(np.ones(state.threads, bool) if mask is True else mask)

    return step


def _wait_for_stores(state: State, instruction: Instruction) -> Step:
    return lambda mask: state.tensor_memory.wait(False, state.whole_warps(instruction, mask))


def _commit(state: State, instruction: Instruction) -> Step:
    address = bind_address(state, instruction, instruction.operands[0], SHARED_WINDOW)

    def step(mask: Mask) -> None:
        threads = state.threads_in(mask)
        products = [state.tensor_memory.products_of(thread) for thread in threads.tolist()]
        state.mbarriers.arrive(address(mask), threads, instruction, mask, products=products)

    return step


class _Form(NamedTuple):
    """What an instruction descriptor says of a product."""

    rows: int
    columns: int
    types: tuple[str, str]
    transposed: tuple[bool, bool]

    @property
    def inner(self) -> int:
        """The number of terms of a sum."""
        return _ROW_BYTES // self.size

    @property
    def size(self) -> int:
        """The bytes of an element of the operands."""
        return 4 if self.types[0] == "tf32" else 2


def _form_of(descriptor: int, kind: str) -> _Form | None:
    """Return the form of a product, or None where it is not known here."""
    types = [_TYPES[kind].get(descriptor >> at & 7, "") for at in (7, 10)]
    rows, columns = (descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3
    float32_results, else_zero = descriptor >> 4 & 3 == 1, descriptor & (15 | 3 << 13 | 1 << 23 | 7 << 29)
    if not all(types) or rows not in (64, LANES) or columns == 0 or not float32_results or else_zero:
        return None
    return _Form(rows, columns, (types[0], types[1]), (bool(descriptor >> 15 & 1), bool(descriptor >> 16 & 1)))


def _lanes(rows: int, address: int) -> Array:
    """Return the lanes of the rows of an operand; one of 64 rows has half the lanes of each warp."""
    row = np.arange(rows)
    return (row if rows == LANES else row // 16 * 32 + row % 16) + (address >> 16)


def _bind_values(state: State, operand: str) -> Callable[[Mask], Array]:
    """Return a function of the mask that gives the 64 bits of an operand."""
    source = state.registers.read(operand, "u64")
    return lambda mask: source if mask is True else source[mask]


def _multiply(state: State, instruction: Instruction) -> Step:
    """Bind `tcgen05.mma`; it runs at once for all blocks whose operands have the same form and place."""
    kind = instruction.one_of(*_TYPES)
    if kind is None or len(instruction.operands) != 5:
        raise instruction.refused("form")
    registers, operands, memory = state.registers, instruction.operands, state.tensor_memory
    result_of = bind_address(state, instruction, operands[0])
    left_in_memory = operands[1].startswith("[")
    left_of = bind_address(state, instruction, operands[1]) if left_in_memory else _bind_values(state, operands[1])
    rights = registers.read(operands[2], "u64")
    form_of, added_of = registers.read(operands[3], "u32"), registers.read(operands[4], "pred")

    def step(mask: Mask) -> None:
        threads = state.threads_in(mask)
        if len(np.unique(threads // state.threads_per_block)) != len(threads):
            raise EmulatorError(f"{instruction.text}: several threads of a block begin it, expected one")
        results, lefts, right = result_of(mask), left_of(mask), rights[threads]
        layouts = (lefts if left_in_memory else lefts >> 14, right >> 14)
        alike: dict[tuple[int, ...], list[int]] = {}
        for at, key in enumerate(zip(results, form_of[threads], added_of[threads], *layouts, strict=True)):
            alike.setdefault(tuple(int(part) for part in key), []).append(at)
        for (result, form, added, *_), chosen in alike.items():
            multiply(threads[chosen], result, form, bool(added), lefts[chosen], right[chosen])

    def read_shared(descriptors: Array, threads: Array, rows: int, form: _Form, which: int) -> tuple[Array, Array]:
        layout = layout_of(int(descriptors[0]), blackwell=True)
        if layout is None:
            raise instruction.refused(f"descriptor {int(descriptors[0]):#x}")
        transposed = form.transposed[which]
        offset = unit_offsets(start_of(descriptors), layout, rows, form.inner, form.size, transposed)
        units, index = state.shared.lend(offset, threads, 1, instruction)
        return matrices_in(units, form.types[which], transposed), index

    def multiply(threads: Array, result: int, descriptor: int, added: bool, lefts: Array, rights: Array) -> None:
        form = _form_of(descriptor, kind)
        if form is None:
            raise instruction.refused(f"instruction descriptor {descriptor:#x}")
        blocks = threads // state.threads_per_block
        lanes, columns = _lanes(form.rows, result), (result & 0xFFFF) + np.arange(form.columns)
        b, lent = read_shared(rights, threads, form.columns, form, 1)
        lents, left_lanes, left_columns = [lent], np.array([]), np.array([])
        if left_in_memory:
            address = int(lefts[0])
            left_lanes, left_columns = _lanes(form.rows, address), (address & 0xFFFF) + np.arange(_ROW_BYTES // 4)
        else:
            a, lent = read_shared(lefts, threads, form.rows, form, 0)
            lents.append(lent)
        for at, (thread, block) in enumerate(zip(threads.tolist(), blocks.tolist(), strict=True)):
            left = _cells(block, left_lanes, left_columns) if left_in_memory else None
            product = Product(thread, tuple(lent[at] for lent in lents), _cells(block, lanes, columns), left)
            memory.begin(product, instruction)
        if left_in_memory:
            words = memory.words[blocks[:, None, None], left_lanes[:, None], left_columns]
            a = numbers_in_words(words, form.types[0]).reshape(len(blocks), form.rows, form.inner)
        words_at = (blocks[:, None, None], lanes[:, None], columns)
        total = a @ b.swapaxes(1, 2)
        if added:
            total += memory.words[words_at].view(np.float32)
        memory.words[words_at] = total.astype(np.float32).view(np.uint32)

    return step


def _cells(block: int, lanes: Array, columns: Array) -> Cells:
    """Return what a product uses in tensor memory, 16 lanes at a time."""
    return Cells(np.array(block), np.unique(lanes // TOGETHER)[:, None], columns[None])


_BIND = {
    "alloc": _allocate,
    "relinquish_alloc_permit": _relinquish,
    "dealloc": _free,
    "ld": _load,
    "st": _store,
    "wait::ld": _wait_for_loads,
    "wait::st": _wait_for_stores,
    "mma": _multiply,
    "commit": _commit,
}

DECODERS = {
    "tcgen05": Decoder(
        _bind,
        f"{' '.join(_BIND)} sync aligned cta_group::1 shared::cta shared::cluster mbarrier::arrive::one "
        "kind::f16 kind::tf32 32x32b 16x32bx2 x1 x2 x4 x8 x16 x32 x64 x128",
        "b32 b64",
        (0, 1, 2, 3, 5),
        (0, 1),
    )
}

"""Order of the blocks' accesses to global memory, which only atomic operations that release and acquire establish.

On a GPU a block may see what another block of the launch has stored only if this comes first: the store, a barrier of
that block (unless the same warp goes on), an atomic operation that releases, an atomic operation of this block on the
same address that acquires, and a barrier (unless the same warp goes on). Here blocks run one after another, so that
values are right without any of this; therefore each access is checked.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tests.emulator.ptx.errors import Race
from tests.emulator.ptx.global_memory import GlobalMemory, Segment
from tests.emulator.ptx.number_types import Array, Mask
from tests.emulator.ptx.program import Instruction, Program
from tests.emulator.ptx.state import State

_GRANULE = 2  # bytes: no kernel of a launch with atomic operations stores less
_WARP, _EPOCH = 20, 20  # bits of a warp's number, and of the number of barriers before

Block = tuple[int, int, int]


def has_order(program: Program) -> bool:
    """Return whether a program asks for results of atomic operations, so that they may order its blocks."""
    return any(instruction.opcode == "atom" for instruction in program.instructions)


class Order:
    """What each block of a launch may see of the others.

    Args:
        grid: number of blocks along each axis.
    """

    def __init__(self, grid: Block) -> None:
        self._grid = grid
        count = int(np.prod(grid)) + 1
        self._writers: dict[int, Array] = {}  # start of a segment -> who wrote each granule: block, epoch and warp
        self._released = np.zeros((count, count), np.int64)  # [reader, writer] epoch and warp of the writer's release
        self._acquired = np.zeros((count, count), np.int64)  # [reader, writer] epoch and warp of the reader then
        self._at: dict[int, Array] = {}  # address -> [writer] what atomic operations on it have released

    def number(self, block: Block) -> int:
        """Return the number of a block, from 1 on."""
        (x, y, z), (width, height, _) = block, self._grid
        return 1 + x + width * (y + height * z)

    def granules(self, segment: Segment) -> Array:
        """Return who wrote each granule of a segment."""
        if segment.base not in self._writers:
            self._writers[segment.base] = np.zeros(len(segment.bytes) // _GRANULE, np.int64)
        return self._writers[segment.base]

    def atomic(self, instruction: Instruction, address: int, block: int, key: int) -> None:
        """Note an atomic operation of a block; `key` is its epoch and warp."""
        released = self._at.setdefault(address, np.zeros(len(self._released), np.int64))
        if _acquires(instruction):
            newer = released > self._released[block]
            self._released[block][newer] = released[newer]
            self._acquired[block][newer] = key
        if _releases(instruction):
            np.maximum(released, self._released[block], out=released)
            released[block] = max(released[block], key)

    def may_see(self, reader: Array, key: Array, writer: Array) -> Array:
        """Return for accesses by blocks `reader` whether they come after the stores `writer` (0: none)."""
        block, epoch, warp = writer >> _EPOCH + _WARP, writer >> _WARP & (1 << _EPOCH) - 1, writer & (1 << _WARP) - 1
        released, acquired = self._released[reader, block], self._acquired[reader, block]
        own = (block == reader) & _covers(key, epoch, warp)
        published = _covers(released, epoch, warp) & _covers(key, acquired >> _WARP, acquired & (1 << _WARP) - 1)
        return np.asarray((writer == 0) | own | ((block != reader) & (released > 0) & published))


class OrderedMemory(GlobalMemory):
    """Global memory in which an access to what another block has stored has to be ordered after that store."""

    def __init__(self, segments: Iterable[Segment], state: State, order: Order, blocks: list[Block]) -> None:
        super().__init__(segments, state.faults)
        self._order, self._shared = order, state.shared
        self._block = np.repeat([order.number(block) for block in blocks], state.threads_per_block).astype(np.int64)
        self._warp = np.arange(len(self._block)) % state.threads_per_block // 32

    def load(self, address: Array, size: int, instruction: Instruction, mask: Mask) -> Array:
        values = super().load(address, size, instruction, mask)
        for writers, index, chosen in self._stores(address, size, instruction, mask):
            self._check(writers[index], chosen, "reads", instruction, mask)
        return values

    def store(self, address: Array, values: Array, instruction: Instruction, mask: Mask) -> None:
        super().store(address, values, instruction, mask)
        for writers, index, chosen in self._stores(address, values.itemsize, instruction, mask):
            self._check(writers[index], chosen, "writes", instruction, mask)
            block, key = self._who(mask)
            writers[index] = (block << _EPOCH + _WARP | key)[chosen][:, None]

    def update(self, address: int, size: int, instruction: Instruction, thread: int) -> tuple[Array, int]:
        block, key = self._who(self._faults.only(thread))
        self._order.atomic(instruction, address, int(block[0]), int(key[0]))
        return super().update(address, size, instruction, thread)

    def _who(self, mask: Mask) -> tuple[Array, Array]:
        """Return block, and epoch and warp, of each thread."""
        chosen: Any = slice(None) if mask is True else mask
        return self._block[chosen], self._shared.barriers << _WARP | self._warp[chosen]

    def _stores(
        self, address: Array, size: int, instruction: Instruction, mask: Mask
    ) -> list[tuple[Array, Array, Any]]:
        """Return for each segment who wrote its granules, and the indices and the accesses that fall into it."""
        segment = self._one_segment(address, size)
        parts: list[tuple[Segment, Any]] = [(segment, slice(None))] if segment is not None else []
        if segment is None:
            parts += self._by_segment(address, size, instruction, mask)
        found = []
        for part, chosen in parts:
            granules = self._order.granules(part)
            wide = max(size, _GRANULE)
            index = self._index(part, address[chosen], wide)
            found.append((granules.reshape(-1, wide // _GRANULE), index, chosen))
        return found

    def _check(self, writer: Array, chosen: Any, doing: str, instruction: Instruction, mask: Mask) -> None:
        if not writer.any():
            return
        block, key = (each[chosen][:, None] for each in self._who(mask))
        right = self._order.may_see(block, key, writer).all(1)
        if not right.all():
            wrong = np.zeros(len(self._who(mask)[0]), bool)
            wrong[chosen] = ~right
            why = f"{doing} what another warp or block stored, which no barrier or atomic operation orders before"
            self._faults.stop(Race, instruction, mask, wrong, why=why)


def _covers(key: Array, epoch: Array, warp: Array) -> Array:
    """Return whether what is at `key` comes after accesses of an epoch and a warp of the same block."""
    return np.asarray((epoch < key >> _WARP) | ((epoch == key >> _WARP) & (warp == (key & (1 << _WARP) - 1))))


def _releases(instruction: Instruction) -> bool:
    return instruction.opcode in ("atom", "red") and instruction.has("acq_rel", "release")


def _acquires(instruction: Instruction) -> bool:
    return instruction.opcode == "atom" and instruction.has("acq_rel", "acquire")

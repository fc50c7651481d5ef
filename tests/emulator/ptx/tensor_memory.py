"""Tensor memory (sm_100): operands and results of `tcgen05.mma`, 128 lanes by 512 columns of 32 bits for each block."""

from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np

from tests.emulator.ptx.errors import EmulatorError, OutOfBounds, Race
from tests.emulator.ptx.faults import Faults
from tests.emulator.ptx.number_types import Array, Mask
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.shared_memory import SharedMemory, by_another

LANES, COLUMNS = 128, 512
TOGETHER = 16  # lanes that every access and every product uses together
_SMALLEST = 32  # columns that can be allocated; a power of two, as are all numbers of columns

# In place of the warp that reads or writes: an access, or a matrix product, that nobody has waited for.
_PRODUCT = np.iinfo(np.int64).max
_ACCESS = _PRODUCT - 1


class Cells(NamedTuple):
    """Indices of words, broadcast against each other: `[n, threads]` of an access, `[lanes, n]` of a product."""

    block: Array
    lane: Array
    column: Array


@dataclass(frozen=True)
class Product:
    """A matrix product of one block that nobody has waited for.

    Args:
        thread: the thread that began it.
        lent: units of shared memory that it reads.
        result: where it writes.
        left: where it reads its left operand, if that is here.
    """

    thread: int
    lent: tuple[Array, ...]
    result: Cells
    left: Cells | None


@dataclass(frozen=True)
class _Access:
    """A load or store of whole warps that some threads have not waited for."""

    loads: bool
    cells: Cells
    threads: Array  # one for each 16 lanes


class TensorMemory:
    """Words that read as NaN until they are written.

    As in shared memory, a word may not be written by one warp and used by another without a barrier between; and none
    may be used while an access or a product is on its way. A product is on its way until an mbarrier that tracks it is
    waited for. Products follow each other in order, on the same result too.

    Args:
        used: whether the program uses tensor memory.
    """

    def __init__(self, used: bool, blocks: int, threads_per_block: int, shared: SharedMemory, faults: Faults) -> None:
        self._shared, self._faults, self._threads_per_block = shared, faults, threads_per_block
        blocks = blocks if used else 0
        self.words = np.empty((blocks, LANES, COLUMNS), np.uint32)
        self._writer = np.zeros((blocks, LANES // TOGETHER, COLUMNS), np.int64)
        self._reader = np.zeros_like(self._writer)
        self._owner = np.zeros((blocks, COLUMNS), np.int64)  # 0, or the first column of the allocation, plus one
        self._permitted = np.ones(blocks, bool)
        self._accesses: list[_Access] = []
        self._products: list[list[Product]] = [[] for _ in range(blocks)]

    def reset(self) -> None:
        """Fill the memory with NaN and forget all accesses."""
        self.words.fill(0xFFFFFFFF)
        for array in (self._writer, self._reader, self._owner):
            array.fill(0)
        self._permitted.fill(True)
        self._accesses.clear()
        for products in self._products:
            products.clear()

    def allocate(self, block: int, columns: int, instruction: Instruction) -> int:
        """Return the first of so many columns, which are the block's until it frees them.

        They are the last that are free, so that a program that takes the first ones for granted is wrong.
        """
        if not _SMALLEST <= columns <= COLUMNS or columns & columns - 1:
            raise EmulatorError(f"{instruction.text}: {columns} columns, expected a power of two from 32 to 512")
        if not self._permitted[block]:
            raise EmulatorError(f"{instruction.text}: the block has given up its permit to allocate")
        for first in range(COLUMNS - columns, -1, -columns):
            if not self._owner[block, first : first + columns].any():
                self._owner[block, first : first + columns] = first + 1
                return first
        raise EmulatorError(f"{instruction.text}: no {columns} columns are free")

    def relinquish(self, block: int) -> None:
        """Give up the right to allocate."""
        self._permitted[block] = False

    def free(self, block: int, first: int, columns: int, instruction: Instruction) -> None:
        """Free an allocation."""
        owned = np.flatnonzero(self._owner[block] == first + 1)
        if len(owned) != columns:
            raise EmulatorError(f"{instruction.text}: {columns} columns from {first} on are no allocation")
        if self._products[block] or any((access.cells.block == block).any() for access in self._accesses):
            raise Race(f"{instruction.text}: accesses or matrix products were not waited for")
        self._owner[block, owned] = 0

    def require_freed(self) -> None:
        """Raise EmulatorError if a block has ended without freeing what it allocated."""
        if self._owner.any():
            block = self._faults.blocks[int(np.flatnonzero(self._owner.any(1))[0])]
            raise EmulatorError(f"block {block} ends without tcgen05.dealloc")

    def load(self, cells: Cells, threads: Array, instruction: Instruction, mask: Mask) -> Array:
        """Begin to load words; `wait` completes it."""
        access = self._begin(True, cells, threads, instruction, mask)
        self._reader[access.cells] = np.maximum(self._reader[access.cells], _ACCESS)
        return self.words[cells]

    def store(self, cells: Cells, values: Array, threads: Array, instruction: Instruction, mask: Mask) -> None:
        """Begin to store words; `wait` completes it."""
        access = self._begin(False, cells, threads, instruction, mask)
        self._writer[access.cells] = _ACCESS
        self.words[cells] = values

    def wait(self, loads: bool, mask: Mask) -> None:
        """Complete the loads, or the stores, that the threads have begun."""
        remaining = []
        for access in self._accesses:
            done = np.full(len(access.threads), access.loads == loads)
            if mask is not True:
                done &= mask[access.threads]
            cells = Cells(*(each[:, done] for each in access.cells))
            key = self._shared.key[access.threads[done], 0]
            if loads:
                readers = self._reader[cells]
                self._reader[cells] = np.where(readers == _PRODUCT, readers, key)
            else:
                self._writer[cells] = key
            if not done.all():
                rest = Cells(*(each[:, ~done] for each in access.cells))
                remaining.append(_Access(access.loads, rest, access.threads[~done]))
        self._accesses = remaining

    def begin(self, product: Product, instruction: Instruction) -> None:
        """Check that a product may begin now, and note what it uses."""
        mask, key = self._faults.only(product.thread), self.key_of(product.thread)
        parts = [(product.result, True)] + [(product.left, False)] * (product.left is not None)
        for cells, writes in parts:
            assert cells is not None
            columns = Cells(cells.block, cells.lane, cells.column.reshape(-1, 1))
            self._require_allocated(columns, instruction, mask)
            for last, done in ((self._writer, "wrote"), (self._reader, "read"))[: 1 + writes]:
                stamps = last[cells]
                if writes:
                    stamps = np.where(stamps == _PRODUCT, 0, stamps)
                doing = "writes what" if writes else "reads what"
                self._check(stamps.reshape(-1, 1), key, doing, done, instruction, mask)
        self._mark(product)
        self._products[product.thread // self._threads_per_block].append(product)

    def products_of(self, thread: int) -> list[Product]:
        """Return the products that the thread has begun and nobody has waited for."""
        return [each for each in self._products[thread // self._threads_per_block] if each.thread == thread]

    def are_pending(self, products: list[Product]) -> bool:
        """Return whether nobody has waited for one of these products."""
        return any(each is product for product in products for each in self.products_of(product.thread))

    def complete(self, products: list[Product]) -> None:
        """End products of one block."""
        block = products[0].thread // self._threads_per_block
        chosen = {id(product) for product in products}
        done = [each for each in self._products[block] if id(each) in chosen]
        self._products[block] = [each for each in self._products[block] if id(each) not in chosen]
        for product in done:
            for index in product.lent:
                self._shared.give_back(index, barrier=False)
            self._writer[product.result] = 0
            if product.left is not None:
                self._reader[product.left] = 0
        for product in self._products[block] if done else []:
            self._mark(product)

    def key_of(self, thread: int) -> Array:
        """Return the record that an access of the thread leaves."""
        return self._shared.key[thread, :1]

    def _mark(self, product: Product) -> None:
        for index in product.lent:
            self._shared.still_lent(index)
        self._writer[product.result] = _PRODUCT
        if product.left is not None:
            self._reader[product.left] = _PRODUCT

    def _begin(self, loads: bool, cells: Cells, threads: Array, instruction: Instruction, mask: Mask) -> _Access:
        """Check and note an access to words `[n, threads]`, of which 16 threads at a time use the same 16 lanes."""
        block, lane, column = (each[:, ::TOGETHER] for each in cells)
        access = _Access(loads, Cells(block, lane // TOGETHER, column), threads[::TOGETHER])
        self._require_allocated(access.cells, instruction, mask)
        key, doing = self._shared.key[access.threads, 0], "reads what" if loads else "writes what"
        self._check(self._writer[access.cells], key, doing, "wrote", instruction, mask)
        if not loads:
            self._check(self._reader[access.cells], key, doing, "read", instruction, mask)
        self._accesses.append(access)
        return access

    def _require_allocated(self, cells: Cells, instruction: Instruction, mask: Mask) -> None:
        inside = cells.column < COLUMNS
        inside &= self._owner[cells.block, np.where(inside, cells.column, 0)] != 0
        if not inside.all():
            self._stop(OutOfBounds, ~inside, "tensor memory that is not allocated", instruction, mask)

    def _check(self, last: Array, key: Array, doing: str, done: str, instruction: Instruction, mask: Mask) -> None:
        """Raise Race if the last use of words conflicts with one by the warps that `key` names."""
        wrong = (last >= self._shared.floor) & by_another(last, key)
        if not wrong.any():
            return
        worst = int(last[wrong].max())
        if worst == _PRODUCT:
            why = f"{doing} a matrix product uses that was not waited for"
        elif worst == _ACCESS:
            why = f"{doing} tcgen05.{'st' if done == 'wrote' else 'ld'} uses, which was not waited for"
        else:
            why = f"{doing} another warp {done}, without a barrier between"
        self._stop(Race, wrong, why, instruction, mask)

    def _stop(
        self, error: type[EmulatorError], wrong: Array, why: str, instruction: Instruction, mask: Mask
    ) -> NoReturn:
        """Raise an error for the first column of `wrong`, of one thread or of 16 threads each."""
        threads = self._faults.threads_in(mask)
        self._faults.stop(error, instruction, mask, np.repeat(wrong.any(0), threads // wrong.shape[1]), why=why)

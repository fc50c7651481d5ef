"""`mbarrier`: barriers in shared memory, of which threads wait for a phase that others, or the hardware, complete."""

from dataclasses import dataclass, field

import numpy as np

from tests.emulator.ptx.errors import EmulatorError, Race
from tests.emulator.ptx.number_types import Array, Mask
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.shared_memory import SharedMemory
from tests.emulator.ptx.tensor_memory import Product, TensorMemory

# What the eight bytes of an mbarrier hold here; its state is kept apart.
_VALID = int.from_bytes(b"mbarrier", "little")
_INVALID = (1 << 64) - 1
_MOST = (1 << 20) - 1  # arrivals of a phase


@dataclass
class _Mbarrier:
    count: int  # arrivals that complete a phase
    missing: int  # of the current phase
    phase: int = 0  # number of phases that are complete
    products: list[tuple[int, list[Product]]] = field(default_factory=list)  # (number of a phase, what it waits for)


class Mbarriers:
    """All mbarriers of the blocks that run together, by block and offset in its shared memory.

    A product that `tcgen05.commit` makes an mbarrier track is computed already, so that it arrives at once; that nobody
    may use its operands and its result before somebody waits for this phase makes it arrive later.
    """

    def __init__(self, threads_per_block: int, shared: SharedMemory, tensor_memory: TensorMemory) -> None:
        self._threads_per_block, self._shared, self._tensor_memory = threads_per_block, shared, tensor_memory
        self._mbarriers: dict[tuple[int, int], _Mbarrier] = {}

    def reset(self) -> None:
        """Forget all mbarriers."""
        self._mbarriers.clear()

    def init(self, offset: Array, threads: Array, count: int, instruction: Instruction, mask: Mask) -> None:
        """Make mbarriers that wait for `count` arrivals, one for each thread in the mask."""
        if not 1 <= count <= _MOST:
            raise EmulatorError(f"{instruction.text}: {count} arrivals, expected 1 to {_MOST}")
        for key in self._keys(offset, threads):
            if key in self._mbarriers:
                raise EmulatorError(f"{instruction.text}: there is an mbarrier already")
            self._mbarriers[key] = _Mbarrier(count, count)
        self._shared.store(offset, np.full(len(offset), _VALID, np.uint64), instruction, mask)

    def invalidate(self, offset: Array, threads: Array, instruction: Instruction, mask: Mask) -> None:
        """End the life of mbarriers."""
        found = self._find(offset, threads, instruction, mask)
        for key, mbarrier in zip(self._keys(offset, threads), found, strict=True):
            if any(self._tensor_memory.are_pending(products) for _, products in mbarrier.products):
                raise Race(f"{instruction.text}: a matrix product that it tracks was not waited for")
            del self._mbarriers[key]
        self._shared.store(offset, np.full(len(offset), _INVALID, np.uint64), instruction, mask)

    def arrive(
        self,
        offset: Array,
        threads: Array,
        instruction: Instruction,
        mask: Mask,
        count: int = 1,
        products: list[list[Product]] | None = None,
    ) -> None:
        """Arrive at an mbarrier for each thread, together with the products that the thread has begun."""
        for at, mbarrier in enumerate(self._find(offset, threads, instruction, mask)):
            if count > mbarrier.missing:
                raise EmulatorError(f"{instruction.text}: more arrivals than the mbarrier waits for")
            if products is not None and products[at]:
                mbarrier.products.append((mbarrier.phase, products[at]))
            mbarrier.missing -= count
            if mbarrier.missing == 0:
                mbarrier.missing = mbarrier.count
                mbarrier.phase += 1

    def wait(self, offset: Array, threads: Array, parity: Array, instruction: Instruction, mask: Mask) -> Array:
        """Return for which threads the phase of that parity is complete; the products that it tracks are, then."""
        calls = (threads // self._threads_per_block) << 33 | offset << 1 | parity
        _, first, of_thread = np.unique(calls, return_index=True, return_inverse=True)
        found = self._find(offset, threads, instruction, mask, first)
        done = np.array([mbarrier.phase & 1 != parity[at] for mbarrier, at in zip(found, first, strict=True)])
        for mbarrier in (mbarrier for mbarrier, complete in zip(found, done, strict=True) if complete):
            for products in [products for phase, products in mbarrier.products if phase < mbarrier.phase]:
                self._tensor_memory.complete(products)
            mbarrier.products = [each for each in mbarrier.products if each[0] >= mbarrier.phase]
        return np.asarray(done[of_thread])

    def _find(
        self, offset: Array, threads: Array, instruction: Instruction, mask: Mask, chosen: Array | None = None
    ) -> list[_Mbarrier]:
        """Return the mbarrier of each thread, or of some; all must be able to see that it was initialised."""
        stored = self._shared.load(offset, 8, instruction, mask)
        if chosen is not None:
            offset, threads = offset[chosen], threads[chosen]
        found = [self._mbarriers.get(key) for key in self._keys(offset, threads)]
        if None in found or (stored != _VALID).any():
            raise EmulatorError(f"{instruction.text}: there is no mbarrier, or something else was written there")
        return [each for each in found if each is not None]

    def _keys(self, offset: Array, threads: Array) -> list[tuple[int, int]]:
        return list(zip((threads // self._threads_per_block).tolist(), offset.tolist(), strict=True))

"""Shared memory of the blocks that run together, which detects two warps that use the same bytes at once."""

from typing import NoReturn

import numpy as np

from tests.emulator.ptx.errors import EmulatorError, Misaligned, OutOfBounds, Race
from tests.emulator.ptx.faults import Faults
from tests.emulator.ptx.number_types import CARRIER, Array, Mask
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.proxy_fences import ProxyFences

MANY = (1 << 20) - 1  # in place of a warp's number: more than one warp
# In place of the writer: cp.async, which has not landed; of the reader: a matrix product that nobody has waited for.
_IN_FLIGHT = np.iinfo(np.int64).max


class SharedMemory:
    """Bytes that read as NaN until they are written.

    Between two barriers no byte may be written by one warp and read or written by another. For each granule of bytes
    there is kept who wrote it last and who read it last, as `epoch << 20 | warp`. Epochs are counted at barriers and
    at proxy fences: one comparison with the epoch of the last barrier tells whether there was one since, another
    whether it was the same warp.

    Matrix products (`wgmma`, `tcgen05.mma`) read through the async proxy, until they are waited for; what threads
    wrote they see only behind a proxy fence.

    Args:
        size: bytes of a block.
        granule: bytes of the smallest access of the program.
    """

    def __init__(self, size: int, granule: int, blocks: int, threads_per_block: int, faults: Faults) -> None:
        self._size, self._faults = size, faults
        stride = -(-size // 32) * 32
        self._bytes = np.empty(max(stride * blocks, 32), np.uint8)
        self._elements = {bytes_: self._bytes.view(carrier) for bytes_, carrier in CARRIER.items()}
        thread = np.arange(blocks * threads_per_block)
        self._base = thread // threads_per_block * stride
        self._warp = thread // 32
        self._writer = np.zeros(len(self._bytes) // granule, np.int64)
        self._reader = np.zeros_like(self._writer)
        sizes = [bytes_ for bytes_ in CARRIER if bytes_ >= granule]
        self._writers = {bytes_: self._writer.reshape(-1, bytes_ // granule) for bytes_ in sizes}
        self._readers = {bytes_: self._reader.reshape(-1, bytes_ // granule) for bytes_ in sizes}
        self._epoch = 0
        self._fences = ProxyFences(blocks, threads_per_block // 32)
        self.reset()

    def reset(self) -> None:
        """Fill the memory with NaN and forget all accesses, for the next blocks."""
        self._bytes.fill(0xFF)
        self._writer.fill(0)
        self._reader.fill(0)
        self._epoch = 0
        self._fences.reset()
        self.barrier()

    @property
    def barriers(self) -> int:
        """A number that grows at every barrier."""
        return self.floor >> 20

    def barrier(self) -> None:
        """Begin a new epoch: accesses before the barrier do not race with those after it."""
        self._fences.barrier()
        self._begin_epoch()
        self.floor = self._epoch << 20

    def fence(self, mask: Mask) -> None:
        """Make what the threads know to be written visible to matrix products."""
        self._begin_epoch()
        self._fences.fence(np.unique(self._warp if mask is True else self._warp[mask]), self.floor >> 20, self._epoch)

    def _begin_epoch(self) -> None:
        self._epoch += 1
        self.key = (self._warp | self._epoch << 20)[:, None]

    def load(self, offset: Array, size: int, instruction: Instruction, mask: Mask) -> Array:
        """Return elements of `size` bytes, one for each offset (int64) in the block's memory."""
        index = self._index(offset, size, instruction, mask)
        self._note_read(index, size, instruction, mask)
        return self._elements[size][index]

    def store(self, offset: Array, values: Array, instruction: Instruction, mask: Mask) -> None:
        """Write elements, one for each offset; threads that write to the same element must write the same value."""
        size = values.itemsize
        index = self._index(offset, size, instruction, mask)
        self._note_write(index, size, instruction, mask)
        elements = self._elements[size]
        elements[index] = values
        self._faults.require_equal(elements[index], values, instruction)

    def launch(self, offset: Array, size: int, instruction: Instruction, mask: Mask) -> Array:
        """Begin an asynchronous copy: until it lands the bytes are NaN, and reading them is an error."""
        index = self._index(offset, size, instruction, mask)
        self._note_write(index, size, instruction, mask)
        self._bytes.reshape(-1, size)[index] = 0xFF
        self._writers[size][index] = _IN_FLIGHT
        return index

    def land(self, index: Array, values: Array, threads: Array) -> None:
        """Complete an asynchronous copy: its threads write the values now."""
        self._elements[values.itemsize][index] = values
        self._writers[values.itemsize][index] = self.key[threads]

    def lend(self, offset: Array, threads: Array, warps: int, instruction: Instruction) -> tuple[Array, Array]:
        """Read for matrix products, and let nobody write there before `give_back`.

        Args:
            offset: `[n, ...]` of elements of 16 bytes in the memory of a block, for n products.
            threads: `[n]` the first thread of each product.
            warps: number of warps, from that thread's on, that take part in a product.

        Returns:
            The elements, and their index for `give_back`; both as `offset`.
        """
        if int(offset.max()) + 16 > self._size:
            at = int(np.flatnonzero((offset + 16 > self._size).reshape(len(offset), -1).any(1))[0])
            found = np.array([offset[at].max()])
            why = f"{self._size} bytes of shared memory"
            self._stop_thread(OutOfBounds, instruction, int(threads[at]), why, found)
        index = (offset + self._base[threads].reshape(-1, *[1] * (offset.ndim - 1))) >> 4
        writers = self._writers[16][index].reshape(len(index), -1)
        readers = self._warp[threads][:, None] + np.arange(warps)
        behind = self._fences.covers(writers >> 20, writers & MANY, readers)
        for wrong, why in (
            (writers == _IN_FLIGHT, "reads what cp.async has not landed yet"),
            (writers >= self.floor, "reads what a warp wrote, without a barrier between"),
            (~behind, "reads what a warp wrote, without a proxy fence between"),
        ):
            if wrong.any():
                self._stop_thread(Race, instruction, int(threads[np.flatnonzero(wrong.any(1))[0]]), why)
        self._readers[16][index] = _IN_FLIGHT
        return self._elements[16][index], index

    def give_back(self, index: Array, barrier: bool) -> None:
        """End reads that `lend` began; where `barrier`, all other warps must pass one before they write there."""
        self._readers[16][index] = self.floor | MANY if barrier else 0

    def still_lent(self, index: Array) -> None:
        """Mark elements again that `give_back` marked as free, where two products read the same."""
        self._readers[16][index] = _IN_FLIGHT

    def update(self, offset: int, size: int, instruction: Instruction, thread: int) -> tuple[Array, int]:
        """Return the array of elements and the index in it that one thread's atomic operation changes."""
        index = self._index(np.array([offset]), size, instruction, self._faults.only(thread))
        return self._elements[size], int(index[0])

    def _index(self, offset: Array, size: int, instruction: Instruction, mask: Mask) -> Array:
        if size > 1 and int(np.bitwise_or.reduce(offset)) & (min(size, 16) - 1):
            self._faults.stop(Misaligned, instruction, mask, (offset & (min(size, 16) - 1)) != 0, offset)
        if len(offset) and int(np.maximum.reduce(offset.view(np.uint64))) + size > self._size:
            outside = (offset < 0) | (offset + size > self._size)
            self._faults.stop(OutOfBounds, instruction, mask, outside, offset, f"{self._size} bytes of shared memory")
        base = self._base if mask is True else self._base[mask]
        return (offset + base) >> (size.bit_length() - 1)

    def _note_read(self, index: Array, size: int, instruction: Instruction, mask: Mask) -> None:
        if not len(index):
            return
        key = self.key if mask is True else self.key[mask]
        self._check(self._writers[size][index], key, "reads what", "wrote", instruction, mask)
        readers = self._readers[size]
        last = readers[index]
        if int(np.maximum.reduce(last, axis=None)) >= self.floor:
            key = np.where((last >= self.floor) & by_another(last, key), self.floor | MANY, key)
            key = np.where(last == _IN_FLIGHT, last, key)
        readers[index] = key
        several = (readers[index] != key).any(1)
        if several.any():
            readers[index[several]] = self.floor | MANY

    def _note_write(self, index: Array, size: int, instruction: Instruction, mask: Mask) -> None:
        if not len(index):
            return
        key = self.key if mask is True else self.key[mask]
        self._check(self._writers[size][index], key, "writes what", "wrote", instruction, mask)
        self._check(self._readers[size][index], key, "writes what", "read", instruction, mask)
        self._writers[size][index] = key

    def _check(self, last: Array, key: Array, doing: str, done: str, instruction: Instruction, mask: Mask) -> None:
        if int(np.maximum.reduce(last, axis=None)) < self.floor:
            return
        wrong = (last >= self.floor) & by_another(last, key)
        if wrong.any():
            if not (last[wrong] == _IN_FLIGHT).any():
                why = f"{doing} another warp {done}, without a barrier between"
            elif done == "wrote":
                why = f"{doing} cp.async has not landed yet"
            else:
                why = f"{doing} a matrix product reads that was not waited for"
            self._faults.stop(Race, instruction, mask, np.asarray(wrong.any(1)), why=why)

    def _stop_thread(
        self,
        error: type[EmulatorError],
        instruction: Instruction,
        thread: int,
        why: str,
        address: Array | None = None,
    ) -> NoReturn:
        self._faults.stop(error, instruction, self._faults.only(thread), np.ones(1, bool), address, why)


def by_another(last: Array, key: Array) -> Array:
    """Return where two records of accesses name different warps."""
    return np.asarray((last ^ key) & MANY != 0)

"""Shared memory of the blocks that run together, which detects two warps that use the same bytes at once."""

import numpy as np

from tests.emulator.ptx.errors import Misaligned, OutOfBounds, Race
from tests.emulator.ptx.faults import Faults
from tests.emulator.ptx.number_types import CARRIER, Array, Mask
from tests.emulator.ptx.program import Instruction

_MANY = (1 << 20) - 1  # in place of a warp's number: more than one warp
_IN_FLIGHT = np.iinfo(np.int64).max  # in place of the writer: cp.async, which has not landed


class SharedMemory:
    """Bytes that read as NaN until they are written.

    Between two barriers (an epoch) no byte may be written by one warp and read or written by another. For each granule
    of bytes there is kept who wrote it last and who read it last, as `epoch << 20 | warp`: one comparison tells
    whether that was in this epoch, another whether it was the same warp.

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
        self.reset()

    def reset(self) -> None:
        """Fill the memory with NaN and forget all accesses, for the next blocks."""
        self._bytes.fill(0xFF)
        self._writer.fill(0)
        self._reader.fill(0)
        self._epoch = 0
        self.barrier()

    def barrier(self) -> None:
        """Begin a new epoch: accesses before the barrier do not race with those after it."""
        self._epoch += 1
        self._floor = self._epoch << 20
        self._key = (self._warp | self._floor)[:, None]

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
        self._writers[values.itemsize][index] = self._key[threads]

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
        key = self._key if mask is True else self._key[mask]
        self._check(self._writers[size][index], key, "reads what", "wrote", instruction, mask)
        readers = self._readers[size]
        last = readers[index]
        if int(np.maximum.reduce(last, axis=None)) >= self._floor:
            key = np.where((last >= self._floor) & (last != key), self._floor | _MANY, key)
        readers[index] = key
        several = (readers[index] != key).any(1)
        if several.any():
            readers[index[several]] = self._floor | _MANY

    def _note_write(self, index: Array, size: int, instruction: Instruction, mask: Mask) -> None:
        if not len(index):
            return
        key = self._key if mask is True else self._key[mask]
        self._check(self._writers[size][index], key, "writes what", "wrote", instruction, mask)
        self._check(self._readers[size][index], key, "writes what", "read", instruction, mask)
        self._writers[size][index] = key

    def _check(self, last: Array, key: Array, doing: str, done: str, instruction: Instruction, mask: Mask) -> None:
        if int(np.maximum.reduce(last, axis=None)) < self._floor:
            return
        wrong = (last >= self._floor) & (last != key)
        if wrong.any():
            if (last[wrong] == _IN_FLIGHT).any():
                why = f"{doing} cp.async has not landed yet"
            else:
                why = f"{doing} another warp {done}, without a barrier between"
            self._faults.stop(Race, instruction, mask, wrong.any(1), why=why)

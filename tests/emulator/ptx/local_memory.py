"""Local memory: bytes that each thread has for itself."""

import numpy as np

from tests.emulator.ptx.errors import Misaligned, OutOfBounds
from tests.emulator.ptx.faults import Faults
from tests.emulator.ptx.number_types import CARRIER, Array, Mask
from tests.emulator.ptx.program import Instruction


class LocalMemory:
    """`size` bytes for each of `threads` threads, poison until written."""

    def __init__(self, size: int, threads: int, faults: Faults) -> None:
        self._stride, self._faults = -(-size // 32) * 32, faults
        self._bytes = np.empty(self._stride * threads, np.uint8)
        self._base = np.arange(threads) * self._stride
        self.reset()

    def reset(self) -> None:
        self._bytes.fill(0xFF)

    def load(self, offset: Array, size: int, instruction: Instruction, mask: Mask) -> Array:
        """Return elements of `size` bytes, one for each offset (int64) in the thread's memory."""
        values: Array = self._bytes.view(CARRIER[size])[self._index(offset, size, instruction, mask)]
        return values

    def store(self, offset: Array, values: Array, instruction: Instruction, mask: Mask) -> None:
        """Write elements, one for each offset."""
        self._bytes.view(values.dtype)[self._index(offset, values.itemsize, instruction, mask)] = values

    def _index(self, offset: Array, size: int, instruction: Instruction, mask: Mask) -> Array:
        misaligned = (offset & (min(size, 16) - 1)) != 0
        if misaligned.any():
            self._faults.stop(Misaligned, instruction, mask, misaligned, offset)
        outside = (offset < 0) | (offset + size > self._stride)
        if outside.any():
            self._faults.stop(OutOfBounds, instruction, mask, outside, offset, f"{self._stride} bytes of local memory")
        base = self._base if mask is True else self._base[mask]
        return (offset + base) >> (size.bit_length() - 1)

"""Global memory: the storages of a kernel's tensor arguments, accessed in place."""

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from tests.emulator.ptx.errors import Misaligned, OutOfBounds
from tests.emulator.ptx.faults import Faults
from tests.emulator.ptx.number_types import CARRIER, Array, Mask
from tests.emulator.ptx.program import Instruction


class Segment:
    """`size` bytes at the address `start`, not copied.

    Args:
        name: the argument that the bytes belong to, for messages.
        owner: an object that is kept alive as long as the segment.
    """

    def __init__(self, name: str, start: int, size: int, owner: object) -> None:
        self.name, self.start, self.size, self.owner = name, start, size, owner
        self.base = start & -32
        self.lead = start - self.base
        self.bytes = (ctypes.c_uint8 * (-(-(self.lead + size) // 32) * 32)).from_address(self.base)
        self._arrays: dict[int, Array] = {}

    def elements(self, size: int) -> Array:
        """Return the memory from `base` on as elements of `size` bytes; only those in the segment may be accessed."""
        if size not in self._arrays:
            self._arrays[size] = np.frombuffer(memoryview(self.bytes), CARRIER[size])
        return self._arrays[size]


class GlobalMemory:
    """Segments, found by address.

    Each access must lie wholly in one segment and be aligned to its size, as PTX demands, to sixteen bytes at most.
    """

    def __init__(self, segments: Iterable[Segment], faults: Faults) -> None:
        self._segments = sorted((s for s in segments if s.size), key=lambda segment: segment.start)
        self._starts = np.array([segment.start for segment in self._segments], np.int64)
        self._ends = np.array([segment.start + segment.size for segment in self._segments], np.int64)
        self._faults = faults
        self._last = self._segments[0] if self._segments else None

    def load(self, address: Array, size: int, instruction: Instruction, mask: Mask) -> Array:
        """Return elements of `size` bytes, one for each address (int64)."""
        self._check_alignment(address, size, instruction, mask)
        segment = self._one_segment(address, size)
        if segment is not None:
            return segment.elements(size)[self._index(segment, address, size)]
        values = np.empty(len(address), CARRIER[size])
        for segment, chosen in self._by_segment(address, size, instruction, mask):
            values[chosen] = segment.elements(size)[self._index(segment, address[chosen], size)]
        return values

    def store(self, address: Array, values: Array, instruction: Instruction, mask: Mask) -> None:
        """Write elements, one for each address; threads that write to the same element must write the same value."""
        size = values.itemsize
        self._check_alignment(address, size, instruction, mask)
        segment = self._one_segment(address, size)
        if segment is not None:
            parts: list[tuple[Segment, Any]] = [(segment, slice(None))]
        else:
            parts = self._by_segment(address, size, instruction, mask)
        for segment, chosen in parts:
            elements, index = segment.elements(size), self._index(segment, address[chosen], size)
            elements[index] = values[chosen]
            self._faults.require_equal(elements[index], values[chosen], instruction)

    def update(self, address: int, size: int, instruction: Instruction, thread: int) -> tuple[Array, int]:
        """Return the array of elements and the index in it that one thread's atomic operation changes."""
        only = np.array([address])
        mask = self._faults.only(thread)
        self._check_alignment(only, size, instruction, mask)
        segment, _ = self._by_segment(only, size, instruction, mask)[0]
        return segment.elements(size), int(self._index(segment, only, size)[0])

    def _check_alignment(self, address: Array, size: int, instruction: Instruction, mask: Mask) -> None:
        needed = min(size, 16) - 1
        if needed and int(np.bitwise_or.reduce(address)) & needed:
            self._faults.stop(Misaligned, instruction, mask, (address & needed) != 0, address)

    def _one_segment(self, address: Array, size: int) -> Segment | None:
        segment = self._last
        if segment is None or not len(address):
            return None
        if not segment.lead:
            from_start = (address - segment.start).view(np.uint64)
            return segment if int(np.maximum.reduce(from_start)) + size <= segment.size else None
        low, high = int(np.minimum.reduce(address)), int(np.maximum.reduce(address))
        return segment if low >= segment.start and high + size <= segment.start + segment.size else None

    @staticmethod
    def _index(segment: Segment, address: Array, size: int) -> Array:
        return (address - segment.base) >> (size.bit_length() - 1)

    def _by_segment(
        self, address: Array, size: int, instruction: Instruction, mask: Mask
    ) -> list[tuple[Segment, Array]]:
        number = np.searchsorted(self._starts, address, "right") - 1
        inside = number >= 0
        inside[inside] = address[inside] + size <= self._ends[number[inside]]
        if not inside.all():
            worst = int(address[np.flatnonzero(~inside)[0]])
            self._faults.stop(OutOfBounds, instruction, mask, ~inside, address, self._nearest(worst, size))
        found = [(self._segments[i], np.flatnonzero(number == i)) for i in np.unique(number)]
        if len(found) == 1:
            self._last = found[0][0]
        return found

    def _nearest(self, address: int, size: int) -> str:
        if not self._segments:
            return "no argument has any memory"
        before = {s.name: s.start - address for s in self._segments}
        after = {s.name: address + size - s.start - s.size for s in self._segments}
        name = min(before, key=lambda each: max(before[each], after[each]))
        if before[name] > 0:
            return f"starts {before[name]} bytes before the memory of {name}"
        return f"ends {after[name]} bytes after the memory of {name}"

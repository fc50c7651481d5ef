"""`cp.async`: copies that reach shared memory when the thread that began them waits for them, not before."""

from dataclasses import dataclass

import numpy as np

from tests.emulator.ptx.number_types import Array, Mask
from tests.emulator.ptx.shared_memory import SharedMemory


@dataclass
class _Copy:
    index: Array  # [n] elements of shared memory
    values: Array  # [n]
    threads: Array  # [n]
    group: Array  # [n] number of the thread's group that the copy belongs to


class AsyncCopies:
    """Copies in flight, in the order in which they began; each thread counts its own groups."""

    def __init__(self, shared: SharedMemory, threads: int) -> None:
        self._shared = shared
        self._committed = np.zeros(threads, np.int64)
        self._flying: list[_Copy] = []

    def reset(self) -> None:
        self._committed.fill(0)
        self._flying.clear()

    def add(self, index: Array, values: Array, mask: Mask) -> None:
        """Begin a copy of `values` (already read) to `index`, one for each thread in `mask`."""
        threads = np.arange(len(self._committed)) if mask is True else np.flatnonzero(mask)
        self._flying.append(_Copy(index, values, threads, self._committed[threads]))

    def commit(self, mask: Mask) -> None:
        """Close each thread's current group: the copies that it has begun and not committed."""
        np.add(self._committed, 1, out=self._committed, where=mask)

    def wait(self, keep: int, mask: Mask) -> None:
        """Complete all of a thread's groups but the last `keep`."""
        due = np.where(mask, self._committed - keep, 0)
        flying = []
        for copy in self._flying:
            landed = copy.group < due[copy.threads]
            if landed.all():
                self._shared.land(copy.index, copy.values, copy.threads)
                continue
            if landed.any():
                self._shared.land(copy.index[landed], copy.values[landed], copy.threads[landed])
                copy = _Copy(copy.index[~landed], copy.values[~landed], copy.threads[~landed], copy.group[~landed])
            flying.append(copy)
        self._flying = flying

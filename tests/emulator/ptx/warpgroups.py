"""The state of warpgroups: the matrix products of `wgmma` that they have begun and not waited for."""

from dataclasses import dataclass

import numpy as np

from tests.emulator.ptx.errors import Divergence, Race
from tests.emulator.ptx.faults import Faults
from tests.emulator.ptx.number_types import Array, Mask
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.registers_in_flight import Flight, RegistersInFlight
from tests.emulator.ptx.shared_memory import SharedMemory

WARPS = 4
THREADS = 32 * WARPS


@dataclass
class _Product:
    """A product in flight, of the warpgroups that have not waited for it."""

    groups: Array  # [n]
    commit: Array  # [n] number of the commit group
    lent: list[Array]  # [n, ...] units of shared memory
    flight: Flight


class Warpgroups:
    """What is kept of each warpgroup: its products in flight, its commit groups, and what its last fence covers.

    Args:
        results: the registers of results.
        threads: number of threads that run together.
    """

    def __init__(
        self, results: frozenset[str], threads: int, shared: SharedMemory, in_flight: RegistersInFlight, faults: Faults
    ) -> None:
        self._shared, self._in_flight, self._faults = shared, in_flight, faults
        self._count = threads // THREADS
        self._rows = {name: row for row, name in enumerate(sorted(results))}
        self._committed = np.zeros(self._count, np.int64)
        # Whether a register of a result was used since the last `wgmma.fence`; at first there was none.
        self._used = np.ones((len(self._rows), self._count), bool)
        self._products: list[_Product] = []

    def reset(self) -> None:
        """Forget all products."""
        self._committed.fill(0)
        self._used.fill(True)
        self._products.clear()

    def at(self, instruction: Instruction, mask: Mask) -> Array:
        """Return the numbers of the warpgroups in a mask, each of which must be there as a whole."""
        if mask is True:
            return np.arange(self._count)
        by_group = mask.reshape(-1, THREADS)
        torn = by_group.any(1) & ~by_group.all(1)
        if torn.any():
            wrong = np.repeat(torn, THREADS)[mask]
            why = "not all threads of the warpgroup take part"
            self._faults.stop(Divergence, instruction, mask, wrong, why=why)
        return np.flatnonzero(by_group.all(1))

    def use(self, names: frozenset[str], mask: Mask) -> None:
        """Note that another instruction uses registers of results."""
        rows = [self._rows[name] for name in names if name in self._rows]
        groups = slice(None) if mask is True else np.flatnonzero(mask.reshape(-1, THREADS).any(1))
        for row in rows:
            self._used[row, groups] = True

    def fence(self, groups: Array) -> None:
        """Order what other instructions have done to registers before the products to come."""
        self._used[:, groups] = False

    def require_fence(self, names: frozenset[str], groups: Array, instruction: Instruction, mask: Mask) -> None:
        """Raise Race if one of the registers was used and no `wgmma.fence` came after."""
        used = np.asarray(self._used[[self._rows[name] for name in names]].any(0))
        if used[groups].any():
            wrong = np.repeat(used, THREADS)
            why = "no wgmma.fence since other instructions used its registers"
            self._faults.stop(Race, instruction, mask, wrong if mask is True else wrong[mask], why=why)

    def begin(self, groups: Array, lent: list[Array], flight: Flight) -> None:
        """Add a product to the open commit group of each of its warpgroups."""
        self._products.append(_Product(groups, self._committed[groups], lent, flight))

    def commit(self, groups: Array) -> None:
        """Close the open commit groups."""
        self._committed[groups] += 1

    def wait(self, keep: int, groups: Array) -> None:
        """Complete the products of all commit groups but the last `keep`."""
        waits = np.zeros(self._count, bool)
        waits[groups] = True
        remaining = []
        for product in self._products:
            done = waits[product.groups] & (product.commit < self._committed[product.groups] - keep)
            if done.any():
                threads = np.zeros(self._count, bool)
                threads[product.groups[done]] = True
                self._in_flight.land(product.flight, np.repeat(threads, THREADS))
                for index in product.lent:
                    self._shared.give_back(index[done], barrier=True)
                lent = [index[~done] for index in product.lent]
                product = _Product(product.groups[~done], product.commit[~done], lent, product.flight)
            if len(product.groups):
                remaining.append(product)
        self._products = remaining
        for product in remaining:
            for index in product.lent:
                self._shared.still_lent(index)

"""Registers that asynchronous instructions have yet to write: using them before they are waited for is an error."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tests.emulator.ptx.errors import Race
from tests.emulator.ptx.faults import Faults
from tests.emulator.ptx.number_types import Array, Mask
from tests.emulator.ptx.program import Instruction


@dataclass
class Flight:
    """The registers that one instruction writes, of the threads that have not waited for it."""

    names: frozenset[str]
    threads: Array  # [threads] bool
    accumulator: str  # products with the same one may follow each other; empty if nothing may
    why: str


class RegistersInFlight:
    """All flights of the blocks that run together.

    The results are in the registers at once; that nobody may look at them before they are waited for makes them arrive
    later.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._flights: list[Flight] = []

    def reset(self) -> None:
        """Forget all flights."""
        self._flights.clear()

    def begin(self, names: Iterable[str], threads: Array, accumulator: str, why: str) -> Flight:
        """Make registers unusable to the threads."""
        self._flights.append(Flight(frozenset(names), threads.copy(), accumulator, why))
        return self._flights[-1]

    def land(self, flight: Flight, threads: Array) -> None:
        """Make the registers usable to those threads."""
        flight.threads &= ~threads
        if not flight.threads.any():
            self._flights = [other for other in self._flights if other is not flight]

    def land_loads(self, threads: Array) -> None:
        """Make the registers of all flights usable to those threads, except those of products."""
        for flight in [flight for flight in self._flights if not flight.accumulator]:
            self.land(flight, threads)

    def check(self, names: frozenset[str], instruction: Instruction, mask: Mask, accumulator: str = "") -> None:
        """Raise Race if one of the registers is in flight, unless from a product with the same accumulator."""
        for flight in self._flights:
            if not names.isdisjoint(flight.names) and not (accumulator and flight.accumulator == accumulator):
                self._require_landed(flight, instruction, mask)

    def copy(self, targets: frozenset[str], sources: frozenset[str], instruction: Instruction, mask: Mask) -> None:
        """Follow a `mov`: what it copies of a load that is on its way is on its way too."""
        self.check(targets, instruction, mask)
        for flight in [flight for flight in self._flights if not sources.isdisjoint(flight.names)]:
            if flight.accumulator:
                self._require_landed(flight, instruction, mask)
            elif np.any(threads := flight.threads & mask):
                self.begin(targets, threads, "", flight.why)

    def _require_landed(self, flight: Flight, instruction: Instruction, mask: Mask) -> None:
        wrong = flight.threads if mask is True else flight.threads[mask]
        if np.any(wrong):
            self._faults.stop(Race, instruction, mask, wrong, why=flight.why)

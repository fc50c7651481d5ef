"""The registers of all threads that run together: a row of an array for each register, a column for each thread."""

import re
import struct
from collections.abc import Mapping

import numpy as np

from tests.emulator.ptx.errors import UnknownInstruction
from tests.emulator.ptx.number_types import BITS, PACKED, UNSIGNED, Array, numpy_type


class Registers:
    """Operands as numpy arrays that live as long as the program, so that an instruction is bound to them once.

    Args:
        declared: name -> type of each register.
        fixed: name -> values [threads] of the special registers.
        symbols: name -> address of the names that the program may use in place of a number.
        threads: number of threads that run together.
    """

    def __init__(
        self, declared: Mapping[str, str], fixed: Mapping[str, Array], symbols: Mapping[str, int], threads: int
    ) -> None:
        self.threads = threads
        self._fixed = fixed
        self._symbols = symbols
        self._bits = {name: BITS[ptx_type] for name, ptx_type in declared.items()}
        self._rows: dict[str, int] = {}
        counts = dict.fromkeys((1, *UNSIGNED), 0)
        for name, bits in self._bits.items():
            self._rows[name] = counts[bits]
            counts[bits] += 1
        self.files: dict[int, Array] = {
            bits: np.empty((count, threads), UNSIGNED[bits] if bits > 1 else bool) for bits, count in counts.items()
        }
        self._scratch = np.empty(2 * threads)

    def reset(self) -> None:
        """Reset all values: a register that was never written reads as NaN, -1 or true."""
        for bits, file in self.files.items():
            file.fill(True if bits == 1 else np.iinfo(file.dtype).max)

    def bits(self, name: str) -> int:
        """Return the width of a register in bits, 1 for a predicate."""
        if name not in self._bits:
            raise UnknownInstruction(f"register {name}")
        return self._bits[name]

    def rows(self, names: list[str], bits: int) -> Array:
        """Return the row numbers of registers in `files[bits]`."""
        if any(self.bits(name) != bits for name in names):
            raise UnknownInstruction(f"registers {names} are not all of {bits} bits")
        return np.array([self._rows[name] for name in names])

    def read(self, operand: str, ptx_type: str) -> Array:
        """Return the operand as `ptx_type`: a view of its register or a constant, [threads] (packed: [2 * threads])."""
        dtype = numpy_type(ptx_type)
        if operand in self._bits:
            row: Array = self.files[self._bits[operand]][self._rows[operand]]
            if self._bits[operand] < BITS[ptx_type]:
                raise UnknownInstruction(f"register {operand} read as {ptx_type}")
            narrow = self._bits[operand] // BITS[ptx_type]
            return row.view(UNSIGNED[BITS[ptx_type]])[::narrow].view(dtype) if narrow > 1 else row.view(dtype)
        if operand in self._fixed and BITS[ptx_type] == 32:
            return self._fixed[operand].view(dtype)
        if operand in ("%clock", "%clock64", "%globaltimer"):
            return self._constant(0, ptx_type)
        return self._constant(self._number(operand, BITS[ptx_type]), ptx_type)

    def write(self, operand: str, ptx_type: str) -> Array:
        """Return the register as an array of `ptx_type` to write to; for `_` an array that nothing reads."""
        if operand == "_":
            return np.empty((1 + (ptx_type in PACKED)) * self.threads, numpy_type(ptx_type))
        if self.bits(operand) != BITS[ptx_type]:
            raise UnknownInstruction(f"register {operand} written as {ptx_type}")
        row: Array = self.files[self._bits[operand]][self._rows[operand]]
        return row.view(numpy_type(ptx_type))

    def native(self, operand: str) -> Array:
        """Return the register as unsigned integers of its full width, to write a narrower value to."""
        bits = 32 if operand == "_" else self.bits(operand)
        return self.write(operand, "pred" if bits == 1 else f"u{bits}")

    def scratch(self, lanes: int) -> Array:
        """Return float64 [lanes * threads] for intermediate values; the next instruction gets the same memory."""
        return self._scratch[: lanes * self.threads]

    def _number(self, operand: str, bits: int) -> int:
        if operand in self._symbols:
            return self._symbols[operand]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", operand):
            number = int(operand[2:], 16)
            if operand[1] in "fF" and bits == 64:
                return int.from_bytes(struct.pack("<d", struct.unpack("<f", struct.pack("<I", number))[0]), "little")
            return number
        try:
            return int(operand.rstrip("U"), 0)
        except ValueError:
            raise UnknownInstruction(f"operand {operand}") from None

    def _constant(self, number: int, ptx_type: str) -> Array:
        if ptx_type == "pred":
            return np.broadcast_to(np.array(bool(number)), (self.threads,))
        bits = BITS[ptx_type]
        value = np.array([number & (1 << bits) - 1], UNSIGNED[bits]).view(numpy_type(ptx_type))
        if ptx_type in PACKED:
            return np.tile(value, self.threads)
        return np.broadcast_to(value, (self.threads,))

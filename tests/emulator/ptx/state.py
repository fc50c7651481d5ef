"""The state of the blocks that run together: registers, parameters, and all memories."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tests.emulator.ptx.async_copies import AsyncCopies
from tests.emulator.ptx.errors import Divergence
from tests.emulator.ptx.faults import Faults
from tests.emulator.ptx.global_memory import GlobalMemory, Segment
from tests.emulator.ptx.local_memory import LocalMemory
from tests.emulator.ptx.mbarriers import Mbarriers
from tests.emulator.ptx.number_types import BITS, UNSIGNED, Array, Mask
from tests.emulator.ptx.program import Instruction, Program
from tests.emulator.ptx.registers import Registers
from tests.emulator.ptx.registers_in_flight import RegistersInFlight
from tests.emulator.ptx.shared_memory import SharedMemory
from tests.emulator.ptx.tensor_memory import TensorMemory
from tests.emulator.ptx.warpgroups import Warpgroups

Step = Callable[[Mask], None]  # one instruction, bound to its operands; runs for the threads of the mask

# Bits of an address that no address of a CPU's process has: a window on shared and one on local memory.
SHARED_WINDOW, LOCAL_WINDOW = 1 << 60, 1 << 61


class State:
    """Registers and memories.

    Args:
        shared_bytes: size of a block's shared memory.
        block_count: number of blocks that run together, as if they were one block with all their threads.
    """

    def __init__(self, program: Program, threads_per_block: int, block_count: int, shared_bytes: int) -> None:
        self.program, self.threads_per_block, self.block_count = program, threads_per_block, block_count
        self.threads = threads = threads_per_block * block_count
        self.warps = threads // 32
        self.faults = Faults(program.name, threads_per_block)
        self.parameters = {name: np.zeros(1, UNSIGNED[bits]) for name, bits in program.parameters}
        self.shared = SharedMemory(shared_bytes, _granule(program), block_count, threads_per_block, self.faults)
        self.copies = AsyncCopies(self.shared, threads)
        self.in_flight = RegistersInFlight(self.faults)
        self.async_results = program.asynchronous_results
        self.warpgroups = Warpgroups(self.async_results, threads, self.shared, self.in_flight, self.faults)
        blackwell = any(instruction.opcode == "tcgen05" for instruction in program.instructions)
        self.tensor_memory = TensorMemory(blackwell, block_count, threads_per_block, self.shared, self.faults)
        self.mbarriers = Mbarriers(threads_per_block, self.shared, self.tensor_memory)
        self.constants = []
        symbols = {"global_smem": SHARED_WINDOW}
        for name, values in program.constants.items():
            held = np.frombuffer(values.ljust(-(-len(values) // 32) * 32 + 32, b"\0"), np.uint8).copy()
            address = -(-held.ctypes.data // 16) * 16
            held[address - held.ctypes.data :][: len(values)] = np.frombuffer(values, np.uint8)
            symbols[name] = address
            self.constants.append(Segment(f"the constant {name}", address, len(values), held))
        local_bytes = 0
        for name, size in program.local.items():
            symbols[name] = LOCAL_WINDOW + local_bytes
            local_bytes += -(-size // 16) * 16
        self.local = LocalMemory(local_bytes, threads, self.faults)
        self.global_memory = GlobalMemory((), self.faults)
        self._block_ids = np.zeros((3, threads), np.uint32)
        self._grid = np.zeros((3, threads), np.uint32)
        self.registers = Registers(program.registers, self._special_registers(), symbols, threads)
        self.carry = np.zeros(threads, np.uint32)

    @contextmanager
    def started(
        self, blocks: list[tuple[int, int, int]], grid: tuple[int, int, int], memory: GlobalMemory
    ) -> Iterator[None]:
        """Set the state to that before the first instruction of `blocks`; release `memory` afterwards."""
        self.global_memory = memory
        self.faults.blocks = blocks
        self._block_ids[:] = np.repeat(np.array(blocks, np.uint32).T, self.threads_per_block, axis=1)
        self._grid[:] = np.array(grid, np.uint32)[:, None]
        self.registers.reset()
        self.shared.reset()
        self.local.reset()
        self.copies.reset()
        self.in_flight.reset()
        self.warpgroups.reset()
        self.tensor_memory.reset()
        self.mbarriers.reset()
        try:
            yield
            self.tensor_memory.require_freed()
        finally:
            self.global_memory = GlobalMemory((), self.faults)

    def whole_warps(self, instruction: Instruction, mask: Mask) -> Mask:
        """Return `mask`, in which each warp must have all of its threads or none.

        Raises:
            Divergence: a warp has only some of its threads.
        """
        if mask is not True:
            by_warp = mask.reshape(-1, 32)
            torn = by_warp.any(1) & ~by_warp.all(1)
            if torn.any():
                wrong = np.repeat(torn, 32)[mask]
                self.faults.stop(Divergence, instruction, mask, wrong, why="not all threads of the warp take part")
        return mask

    def threads_in(self, mask: Mask) -> Array:
        """Return the numbers of the threads in a mask."""
        return np.arange(self.threads) if mask is True else np.flatnonzero(mask)

    def lanes(self, mask: Mask, lanes: int) -> Mask:
        """Return the mask of an array with `lanes` values for each thread."""
        return mask if mask is True or lanes == 1 else np.repeat(mask, lanes)

    def _special_registers(self) -> dict[str, Array]:
        thread = np.arange(self.threads, dtype=np.uint32) % np.uint32(self.threads_per_block)
        one = np.ones(self.threads, np.uint32)
        fixed: dict[str, Array] = {
            "%tid.x": thread,
            "%tid.y": one * np.uint32(0),
            "%tid.z": one * np.uint32(0),
            "%laneid": thread % np.uint32(32),
            "%warpid": thread // np.uint32(32),
            "%ntid.x": one * np.uint32(self.threads_per_block),
            "%ntid.y": one,
            "%ntid.z": one,
        }
        for axis, name in enumerate("xyz"):
            fixed[f"%ctaid.{name}"], fixed[f"%nctaid.{name}"] = self._block_ids[axis], self._grid[axis]
        return fixed


def _granule(program: Program) -> int:
    """Return the size in bytes of the smallest access to shared memory."""
    sizes = [16]
    for instruction in program.instructions:
        generic = instruction.opcode in ("ld", "st", "atom", "red") and not instruction.has("global", "local", "param")
        if generic and instruction.types:
            sizes.append(BITS[instruction.types[-1]] // 8)
        if instruction.opcode == "cp" and len(instruction.operands) > 2:
            sizes.append(int(instruction.operands[2], 0))
        if instruction.opcode in ("mbarrier", "tcgen05"):
            sizes.append(4)  # an address in tensor memory; an mbarrier has 8
    return min(sizes)


def register_list(operand: str) -> list[str]:
    """Return the register names in an operand like `{%r1, %r2}` or `%r1`."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def bind_address(state: State, instruction: Instruction, operand: str, window: int = 0) -> Callable[[Mask], Array]:
    """Return a function of the mask that gives the int64 addresses of an operand like `[%rd1+16]`, less the window."""
    inner = operand.strip("[] ")
    parts = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", inner)
    base, offset = (parts[1].strip(), int(parts[2], 0)) if parts else (inner, 0)
    registers = state.registers
    wide = not base.startswith("%") or registers.bits(base) == 64
    source = registers.read(base, "s64" if wide else "u32")
    keep = np.int64(~window & (1 << 63) - 1)
    change: Any = np.int64(offset)

    def addresses(mask: Mask) -> Array:
        chosen: Array = source if mask is True else source[mask]
        address: Array = chosen + change if wide else chosen.astype(np.int64) + change
        return address & keep if window and wide else address

    return addresses

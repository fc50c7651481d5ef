"""`mbarrier` and `elect`: instructions by which threads wait for asynchronous work, and one begins it."""

from collections.abc import Callable

import numpy as np

from tests.emulator.ptx.decoder import Decoder
from tests.emulator.ptx.number_types import Array, Mask
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.state import SHARED_WINDOW, State, Step, bind_address


def bind_wait(state: State, instruction: Instruction) -> Callable[[Mask], Array]:
    """Return a function of the mask that tells which threads `try_wait` lets go on; the others have to try again.

    On a GPU it may also return false after some time, and the program tries again itself: here it returns true only.
    """
    if not instruction.has("parity") or instruction.predicate is not None or len(instruction.operands) != 3:
        raise instruction.refused("form")
    out = state.registers.write(instruction.operands[0], "pred")
    address = bind_address(state, instruction, instruction.operands[1], SHARED_WINDOW)
    parity = state.registers.read(instruction.operands[2], "u32")

    def wait(mask: Mask) -> Array:
        threads = state.threads_in(mask)
        parities = parity[threads].astype(np.int64) & 1
        passed = np.zeros(state.threads, bool)
        passed[threads] = state.mbarriers.wait(address(mask), threads, parities, instruction, mask)
        out[passed] = True
        return passed

    return wait


def _bind(state: State, instruction: Instruction) -> Step:
    operands, mbarriers = instruction.operands, state.mbarriers
    if instruction.has("arrive"):
        if operands[0] != "_":
            raise instruction.refused("state of the phase")
        operands = operands[1:]
    address = bind_address(state, instruction, operands[0], SHARED_WINDOW)
    count = int(operands[1], 0) if len(operands) > 1 else 1
    if instruction.has("init"):
        return lambda mask: mbarriers.init(address(mask), state.threads_in(mask), count, instruction, mask)
    if instruction.has("inval"):
        return lambda mask: mbarriers.invalidate(address(mask), state.threads_in(mask), instruction, mask)
    if instruction.has("arrive"):
        return lambda mask: mbarriers.arrive(address(mask), state.threads_in(mask), instruction, mask, count)
    raise instruction.refused("form")


def _elect(state: State, instruction: Instruction) -> Step:
    """Bind `elect.sync`, which chooses the first thread of the warp that takes part."""
    leader, predicate = instruction.operands[0].split("|")
    lane_out, chosen_out = state.registers.write(leader, "u32"), state.registers.write(predicate, "pred")
    lane = np.arange(state.threads) % 32

    def step(mask: Mask) -> None:
        state.whole_warps(instruction, mask)
        np.copyto(lane_out, np.uint32(0), where=mask)
        np.copyto(chosen_out, lane == 0, where=mask)

    return step


DECODERS = {
    "mbarrier": Decoder(_bind, "init inval arrive try_wait parity shared shared::cta", "b64", (1, 2, 3)),
    "elect": Decoder(_elect, "sync", "", (2,), (0,)),
}

"""Instructions on whole warps (shuffles, votes, reductions), and those that have no effect in the emulator."""

import numpy as np

from tests.emulator.ptx.decoder import Decoder
from tests.emulator.ptx.errors import EmulatorError
from tests.emulator.ptx.number_types import Array, Mask, is_signed
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.state import State, Step


def _shuffle_sources(mode: str, lane: Array, count: Array, limits: Array) -> tuple[Array, Array]:
    """Return the lane that each thread reads from, its own where that lies outside its segment, and a flag for that."""
    segment, clamp, by = (limits >> 8) & 31, limits & 31, count & 31
    largest, smallest = (lane & segment) | (clamp & ~segment), lane & segment
    if mode == "up":
        source = lane - by
        valid = source >= largest
    else:
        source = {"bfly": lane ^ by, "down": lane + by, "idx": smallest | (by & ~segment)}[mode]
        valid = source <= largest
    return np.where(valid, source, lane), valid


def _shuffle(state: State, instruction: Instruction) -> Step:
    mode = instruction.one_of("bfly", "up", "down", "idx")
    if mode is None:
        raise instruction.refused("mode")
    target, *predicate = instruction.operands[0].split("|")
    registers = state.registers
    value = registers.read(instruction.operands[1], "u32")
    out = registers.write(target, "u32")
    valid_out = registers.write(predicate[0], "pred") if predicate else None
    count, limits = (registers.read(operand, "u32") for operand in instruction.operands[2:4])
    lane = np.arange(state.threads) % 32
    first = np.arange(state.threads) - lane

    def sources() -> tuple[Array, Array]:
        source, valid = _shuffle_sources(mode, lane, count.astype(np.int64), limits.astype(np.int64))
        return first + source, valid

    fixed = None if any(operand.startswith("%") for operand in instruction.operands[2:4]) else sources()

    def step(mask: Mask) -> None:
        state.whole_warps(instruction, mask)
        source, valid = fixed or sources()
        np.copyto(out, value[source], where=mask)
        if valid_out is not None:
            np.copyto(valid_out, valid, where=mask)

    return step


def _vote(state: State, instruction: Instruction) -> Step:
    mode = instruction.one_of("any", "all", "ballot")
    if mode is None:
        raise instruction.refused("mode")
    ptx_type = "u32" if mode == "ballot" else "pred"
    out = state.registers.write(instruction.operands[0], ptx_type)
    vote = state.registers.read(instruction.operands[1], "pred")
    weights = np.uint64(1) << np.arange(32, dtype=np.uint64)

    def step(mask: Mask) -> None:
        state.whole_warps(instruction, mask)
        by_warp = vote.reshape(-1, 32)
        if mode == "ballot":
            result = (by_warp * weights).sum(1).astype(np.uint32)
        else:
            result = by_warp.any(1) if mode == "any" else by_warp.all(1)
        np.copyto(out, np.repeat(result, 32), where=mask)

    return step


_REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _reduce(state: State, instruction: Instruction) -> Step:
    name = instruction.one_of(*_REDUCTIONS)
    if name is None:
        raise instruction.refused("operation")
    ptx_type = "s32" if is_signed(instruction.types[0]) else "u32"
    out = state.registers.write(instruction.operands[0], ptx_type)
    value = state.registers.read(instruction.operands[1], ptx_type)

    def step(mask: Mask) -> None:
        state.whole_warps(instruction, mask)
        result = _REDUCTIONS[name].reduce(value.reshape(-1, 32), axis=1, dtype=value.dtype)
        np.copyto(out, np.repeat(result, 32), where=mask)

    return step


def _nothing(state: State, instruction: Instruction) -> Step:
    return lambda mask: None


def _fence(state: State, instruction: Instruction) -> Step:
    """Bind a fence; between threads nothing is out of order here, between the proxies of memory it is."""
    if instruction.has("proxy"):
        if not instruction.has("async"):
            raise instruction.refused("proxy")
        return state.shared.fence
    return lambda mask: None


def _trap(state: State, instruction: Instruction) -> Step:
    def step(mask: Mask) -> None:
        wrong = np.ones(state.threads if mask is True else int(np.count_nonzero(mask)), bool)
        state.faults.stop(EmulatorError, instruction, mask, wrong, why="the kernel gave up")

    return step


DECODERS = {
    "shfl": Decoder(_shuffle, "sync bfly up down idx", "b32", (5,)),
    "vote": Decoder(_vote, "sync any all ballot", "pred b32", (3,)),
    "redux": Decoder(_reduce, "sync add min max and or xor", "b32 u32 s32", (3,)),
    "bar": Decoder(_nothing, "warp sync", "", (1,), (0,)),
    "membar": Decoder(_nothing, "gl cta sys", "", (0,), (0,)),
    "fence": Decoder(
        _fence, "acq_rel sc gpu cta sys proxy async shared::cta mbarrier_init release cluster", "", (0,), (0,)
    ),
    "nanosleep": Decoder(_nothing, "", "u32", (1,)),
    "createpolicy": Decoder(_nothing, "fractional L2::evict_first L2::evict_last L2::evict_normal", "b64", (1, 2)),
    "trap": Decoder(_trap, "", "", (0,), (0,)),
}

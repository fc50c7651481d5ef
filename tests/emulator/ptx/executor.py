"""Run a program: bind its instructions once, then step through it with all threads, or with those that are there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from tests.emulator.ptx import arithmetic, conversion, logic, matrix, mbarrier, tcgen05, transfers, warp, wgmma
from tests.emulator.ptx.decoder import Decoders, vet
from tests.emulator.ptx.errors import Deadlock
from tests.emulator.ptx.number_types import Array, Mask
from tests.emulator.ptx.program import BasicBlock, Instruction, Program, registers_in
from tests.emulator.ptx.state import State, Step

DECODERS: Decoders = {
    **arithmetic.DECODERS,
    **logic.DECODERS,
    **conversion.DECODERS,
    **transfers.DECODERS,
    **matrix.DECODERS,
    **warp.DECODERS,
    **wgmma.DECODERS,
    **tcgen05.DECODERS,
    **mbarrier.DECODERS,
}


@dataclass(frozen=True)
class _Bound:
    """A basic block, ready to run."""

    steps: tuple[Step, ...]
    length: int
    end: str  # "", "branch", "return", "barrier" or "wait"
    condition: Array | None = None
    negated: bool = False
    target: int = 0
    wait: Callable[[Mask], Array] | None = None  # tells which threads may go on


class Executor:
    """A program with the state of `block_count` blocks that run together.

    Where threads diverge, those at the lowest basic block run first, so that they reconverge as early as possible.
    Threads that wait for a phase of an mbarrier try again when no other thread can run.

    Raises:
        UnknownInstruction: an instruction can't be executed; raised before anything has run.
    """

    def __init__(self, program: Program, threads_per_block: int, block_count: int, shared_bytes: int) -> None:
        self.state = State(program, threads_per_block, block_count, shared_bytes)
        self._labels = program.labels
        self._blocks = [self._bind_block(block) for block in program.blocks]

    def run(self) -> int:
        """Run the blocks that the state was started with to their end; return the number of instructions executed."""
        count, current, end = 0, 0, len(self._blocks)
        while current < end:
            block = self._blocks[current]
            for step in block.steps:
                step(True)
            count += block.length
            if not block.end:
                current += 1
            elif block.end == "barrier":
                self.state.shared.barrier()
                current += 1
            elif block.wait is not None:
                passed = block.wait(True)
                if not passed.all():
                    return count + self._run_apart(passed, current + 1, current)
                current += 1
            else:
                taken = self._taken(block)
                if taken is not True and taken.any() and not taken.all():
                    return count + self._run_apart(taken, block.target, current + 1)
                everyone = taken is True or bool(taken.all())
                current = block.target if everyone else current + 1
        return count

    def _run_apart(self, taken: Mask, target: int, following: int) -> int:
        """Continue after a branch that only some threads have taken, until all threads have returned."""
        count, end, state = 0, len(self._blocks), self.state
        at = np.where(taken, target, following)  # [threads] number of a block; `end` when returned
        waiting = np.zeros(state.threads, bool)  # at a barrier
        parked = np.zeros(state.threads, bool)  # at a wait for an mbarrier
        progress = True
        while True:
            runnable = np.where(waiting | parked, end, at)
            current = int(runnable.min())
            if current == end:
                if parked.any():
                    if not progress:
                        self._stop_parked(parked, at)
                    parked[:], progress = False, False
                    continue
                if not waiting.any():
                    return count
                state.shared.barrier()
                waiting[:] = False
                continue
            mask: Mask = runnable == current
            block = self._blocks[current]
            together = True if mask.all() else mask
            for step in block.steps:
                step(together)
            count += block.length
            if block.wait is not None:
                passed = block.wait(together)
                at[passed] = current + 1
                parked |= mask & ~passed
                progress |= bool(passed.any())
                continue
            progress = True
            if block.end in ("branch", "return"):
                taken = self._taken(block)
                at[mask] = block.target if taken is True else np.where(taken, block.target, current + 1)[mask]
            else:
                at[mask] = current + 1
                waiting |= mask & (block.end == "barrier")

    def _stop_parked(self, parked: Array, at: Array) -> NoReturn:
        """Raise Deadlock for the first thread that waits for an mbarrier while no thread can run."""
        instruction = self.state.program.blocks[int(at[parked][0])].end
        assert instruction is not None
        why = "the phase of the mbarrier never completes"
        self.state.faults.stop(Deadlock, instruction, True, parked, why=why)

    @staticmethod
    def _taken(block: _Bound) -> Mask:
        """Return the mask of the threads that take the branch at the end of the block."""
        if block.condition is None:
            return True
        return ~block.condition if block.negated else block.condition

    def _bind_block(self, block: BasicBlock) -> _Bound:
        steps: list[Step] = []
        run: list[Instruction] = []
        for instruction in block.instructions:
            if run and not matrix.may_follow(run[-1], instruction):
                steps += self._bind_mma(run)
                run = []
            if matrix.may_follow(instruction, instruction):
                self._vet(instruction)
                run.append(instruction)
            else:
                steps.append(self._bind(instruction))
        steps += self._bind_mma(run) if run else []
        length = len(block.instructions) + (block.end is not None)
        end = block.end
        if end is None:
            return _Bound(tuple(steps), length, "")
        if end.opcode == "mbarrier":
            self._vet(end)
            return _Bound(tuple(steps), length, "wait", wait=mbarrier.bind_wait(self.state, end))
        condition = self.state.registers.read(end.predicate, "pred") if end.predicate else None
        kind, target = self._end(end)
        return _Bound(tuple(steps), length, kind, condition, end.negated, target)

    def _end(self, instruction: Instruction) -> tuple[str, int]:
        """Return kind and target of a block's last instruction; `ret` goes to the block after the last."""
        last = len(self.state.program.blocks)
        if instruction.opcode in ("ret", "exit") and not instruction.operands:
            return "return", last
        if instruction.opcode == "bra" and set(instruction.modifiers) <= {"uni"} and len(instruction.operands) == 1:
            if instruction.operands[0] not in self._labels:
                raise instruction.refused("label")
            return "branch", self._labels[instruction.operands[0]]
        everyone = set(instruction.modifiers) <= {"sync", "cta", "aligned"} and instruction.operands == ("0",)
        if instruction.opcode in ("bar", "barrier") and everyone and instruction.predicate is None:
            return "barrier", 0
        raise instruction.refused("form")

    def _vet(self, instruction: Instruction) -> None:
        if instruction.opcode not in DECODERS:
            raise instruction.refused("not known here")
        vet(instruction, DECODERS[instruction.opcode])

    def _bind(self, instruction: Instruction) -> Step:
        self._vet(instruction)
        step = DECODERS[instruction.opcode].bind(self.state, instruction)
        if instruction.opcode != "wgmma":  # which checks its registers itself: products on one result may follow
            step = self._guarded([instruction], step)
        return self._predicated(instruction, step) if instruction.predicate else step

    def _bind_mma(self, run: list[Instruction]) -> list[Step]:
        return [self._guarded(run, step) for step in matrix.bind_mma(self.state, run)]

    def _guarded(self, instructions: list[Instruction], step: Step) -> Step:
        """Return the step, which checks first that no register of the instructions is still to be written."""
        state, first = self.state, instructions[0]
        names = registers_in(*(operand for each in instructions for operand in each.operands)) & state.async_results
        if not names:
            return step
        targets, sources = registers_in(first.operands[0]), registers_in(*first.operands[1:])

        def run(mask: Mask) -> None:
            # The compiler moves copies across fences and waits; the assembler renames registers instead.
            if first.opcode == "mov":
                state.in_flight.copy(targets, sources, first, mask)
            else:
                state.in_flight.check(names, first, mask)
                state.warpgroups.use(names, mask)
            step(mask)

        return run

    def _predicated(self, instruction: Instruction, step: Step) -> Step:
        assert instruction.predicate is not None
        predicate = self.state.registers.read(instruction.predicate, "pred")
        negated, threads = instruction.negated, self.state.threads

        def run(mask: Mask) -> None:
            chosen = ~predicate if negated else predicate
            if mask is not True:
                chosen = chosen & mask
            count = np.count_nonzero(chosen)
            if count == threads:
                step(True)
            elif count:
                step(chosen.copy())

        return run

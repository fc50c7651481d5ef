"""What it takes to execute one kind of instruction."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.state import State, Step


class Decoder(NamedTuple):
    """Binds instructions of one opcode, after they have been found to be of a form that it knows.

    Args:
        bind: gives the step that executes the instruction; raises UnknownInstruction if it can't.
        modifiers: all that the instruction may have, types aside.
        types: all that it may name.
        operands: how many it may have.
        type_count: how many types it names.
    """

    bind: Callable[[State, Instruction], Step]
    modifiers: str
    types: str
    operands: tuple[int, ...]
    type_count: tuple[int, ...] = (1,)


Decoders = Mapping[str, Decoder]


def vet(instruction: Instruction, decoder: Decoder) -> None:
    """Raise UnknownInstruction unless the instruction has a form that the decoder knows."""
    strange = set(instruction.modifiers) - set(decoder.modifiers.split())
    strange |= set(instruction.types) - set(decoder.types.split())
    if strange:
        raise instruction.refused(f"{', '.join(sorted(strange))} is not known here")
    if len(instruction.operands) not in decoder.operands:
        raise instruction.refused(f"{len(instruction.operands)} operands")
    if len(instruction.types) not in decoder.type_count:
        raise instruction.refused(f"{len(instruction.types)} types")

"""The description of one kind of instruction: the forms that are allowed, and how it is bound to its operands."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.state import State, Step


class Decoder(NamedTuple):
    """How instructions of one opcode are checked and bound.

    Args:
        bind: returns the step that executes the instruction; raises UnknownInstruction if it can't.
        modifiers: the modifiers that the instruction may have, separated by spaces; types excluded.
        types: the types that it may name.
        operands: the numbers of operands that it may have.
        type_count: the numbers of types that it may name.
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

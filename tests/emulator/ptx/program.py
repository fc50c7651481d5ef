"""PTX text as data: instructions with their operands apart, cut into basic blocks."""

import re
from dataclasses import dataclass

from tests.emulator.ptx.errors import UnknownInstruction
from tests.emulator.ptx.number_types import BITS

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(?:\.\w+[^\n{]*\s*)*\{", re.S)
_CONSTANT = re.compile(r"\.global\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]\s*=\s*\{([^}]*)\}")
_LOCAL = re.compile(r"\.local\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]$")
_LABEL = re.compile(r"([$\w]+):(?!:)\s*")
_PREDICATE = re.compile(r"@(!?)(%?[\w$]+)\s+")
# Braces with statements between, not only with operands or with the operands of those statements.
_SCOPE = re.compile(r"\{((?:[^{};]|\{[^{};]*\})*;(?:[^{}]|\{[^{};]*\})*)\}")


@dataclass(frozen=True)
class Instruction:
    """One instruction; `types` are those of its modifiers that name a type, in order."""

    text: str
    predicate: str | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[str, ...]

    def has(self, *modifiers: str) -> bool:
        return any(modifier in self.modifiers for modifier in modifiers)

    def one_of(self, *modifiers: str) -> str | None:
        return next((modifier for modifier in self.modifiers if modifier in modifiers), None)

    def refused(self, why: str) -> UnknownInstruction:
        return UnknownInstruction(f"{self.text}: {why}")


@dataclass(frozen=True)
class BasicBlock:
    """Instructions that run one after the other; `end` is the branch, return, barrier or wait behind them, if any."""

    instructions: tuple[Instruction, ...]
    end: Instruction | None


@dataclass(frozen=True)
class Program:
    """The one kernel of a PTX module."""

    name: str
    parameters: tuple[tuple[str, int], ...]  # (name, bits)
    registers: dict[str, str]  # name: type
    constants: dict[str, bytes]
    local: dict[str, int]  # name: bytes for each thread
    blocks: tuple[BasicBlock, ...]
    labels: dict[str, int]  # name: number of a block

    @property
    def register_bytes(self) -> int:
        """What the registers of one thread take."""
        return sum(-(-BITS[ptx_type] // 8) for ptx_type in self.registers.values())

    @property
    def instructions(self) -> list[Instruction]:
        ends = [block.end for block in self.blocks if block.end is not None]
        return [instruction for block in self.blocks for instruction in block.instructions] + ends

    @property
    def asynchronous_results(self) -> frozenset[str]:
        """The registers that an instruction may write after the next one has begun, and copies of them."""
        late = {("wgmma", "mma_async"), ("tcgen05", "ld")}
        names: set[str] = set()
        for instruction in self.instructions:
            if any((instruction.opcode, modifier) in late for modifier in instruction.modifiers):
                names |= registers_in(instruction.operands[0])
        copies = [each.operands for each in self.instructions if each.opcode == "mov"]
        found = -1
        while found != len(names):
            found = len(names)
            for target, source in copies:
                if not names.isdisjoint(registers_in(source)):
                    names |= registers_in(target)
        return frozenset(names)


def registers_in(*operands: str) -> frozenset[str]:
    """Return the names in operands, of registers and of special registers."""
    return frozenset(re.findall(r"%[\w$.]+", " ".join(operands)))


def parse(ptx: str) -> Program:
    """Read the PTX text of a module with one kernel.

    Raises:
        UnknownInstruction: the text has a declaration or a kernel of a kind that is not read here.
    """
    ptx = re.sub(r"//[^\n]*", "", ptx)
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise UnknownInstruction(f"a module with {len(entries)} kernels")
    entry = entries[0]
    parameters = tuple(_parameter(declaration) for declaration in entry[2].split(",") if declaration.strip())
    constants = {
        name: bytes(int(byte) for byte in values.split(",")).ljust(int(size), b"\0")
        for name, size, values in _CONSTANT.findall(ptx)
    }
    body = _body(ptx, entry.end())
    body = _without_scopes(re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*$", "", body, flags=re.M))
    registers: dict[str, str] = {}
    local: dict[str, int] = {}
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for raw in body.split(";"):
        statement = raw.lstrip()
        while label := _LABEL.match(statement):
            labels[label[1]] = len(code)
            statement = statement[label.end() :]
        statement = " ".join(statement.split())
        if statement.startswith(".reg "):
            registers.update(_declared(statement))
        elif declaration := _LOCAL.match(statement):
            local[declaration[1]] = int(declaration[2])
        elif statement.startswith("."):
            raise UnknownInstruction(f"declaration {statement}")
        elif statement:
            code.append(_instruction(statement))
    blocks, starts = _basic_blocks(code, set(labels.values()))
    places = {name: starts[min(at, len(code))] for name, at in labels.items()}
    return Program(entry[1], parameters, registers, constants, local, blocks, places)


def _body(ptx: str, start: int) -> str:
    """Return the text from `start` to the brace that closes the one before it."""
    depth = 1
    for brace in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return ptx[start : start + brace.start()]
    raise UnknownInstruction("a kernel without an end")


def _without_scopes(body: str) -> str:
    """Dissolve blocks in braces; the registers and labels of each get names that no other block has."""
    number = 0

    def dissolve(scope: re.Match[str]) -> str:
        nonlocal number
        number += 1
        text = scope[1]
        declared = [_declared(" ".join(part.split())) for part in re.findall(r"\.reg\s[^;]*", text)]
        labels = [_LABEL.match(part.lstrip()) for part in text.split(";")]
        names = {name for registers in declared for name in registers} | {label[1] for label in labels if label}
        for name in names:
            text = re.sub(rf"(?<![\w$%.]){re.escape(name)}(?![\w$])", f"{name}${number}", text)
        return text

    while _SCOPE.search(body):
        body = _SCOPE.sub(dissolve, body)
    return body


def _parameter(declaration: str) -> tuple[str, int]:
    found = re.match(r"\s*\.param(?:\s+\.align\s+\d+)?\s+\.(\w+).*?([\w$]+)(?:\[(\d+)\])?\s*$", declaration, re.S)
    if found is None or found[1] not in BITS:
        raise UnknownInstruction(f"parameter {declaration.strip()}")
    return found[2], BITS[found[1]] * int(found[3] or 1)


def _declared(statement: str) -> dict[str, str]:
    _, ptx_type, names = statement.split(None, 2)
    registers = {}
    for name in names.split(","):
        counted = re.match(r"(.+)<(\d+)>$", name.strip())
        each = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name.strip()]
        registers.update(dict.fromkeys(each, ptx_type[1:]))
    return registers


def _instruction(statement: str) -> Instruction:
    predicate = _PREDICATE.match(statement)
    bare = statement[predicate.end() :] if predicate else statement
    name, _, operands = bare.partition(" ")
    opcode, *suffixes = name.split(".")
    return Instruction(
        text=statement,
        predicate=predicate[2] if predicate else None,
        negated=bool(predicate and predicate[1]),
        opcode=opcode,
        modifiers=tuple(suffix for suffix in suffixes if suffix not in BITS),
        types=tuple(suffix for suffix in suffixes if suffix in BITS),
        operands=tuple(_split(operands)),
    )


def _split(operands: str) -> list[str]:
    """Split operands at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in operands:
        depth += (character in "{[(") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _ends_block(instruction: Instruction) -> bool:
    barrier = instruction.opcode in ("bar", "barrier") and not instruction.has("warp")
    return barrier or _waits(instruction) or instruction.opcode in ("bra", "ret", "exit")


def _waits(instruction: Instruction) -> bool:
    """Return whether the instruction waits for an mbarrier; it has a block for itself, to be tried again alone."""
    return instruction.opcode == "mbarrier" and instruction.has("try_wait")


def _basic_blocks(code: list[Instruction], targets: set[int]) -> tuple[tuple[BasicBlock, ...], dict[int, int]]:
    """Return the basic blocks, and the block numbers by the positions at which they start (or the code ends)."""
    blocks: list[BasicBlock] = []
    starts: dict[int, int] = {}
    current: list[Instruction] = []
    first = True
    for at, instruction in enumerate(code):
        if (at in targets or _waits(instruction)) and current:
            blocks.append(BasicBlock(tuple(current), None))
            current, first = [], True
        if first or at in targets:
            starts[at] = len(blocks)
            first = False
        if _ends_block(instruction):
            blocks.append(BasicBlock(tuple(current), instruction))
            current, first = [], True
        else:
            current.append(instruction)
    if current:
        blocks.append(BasicBlock(tuple(current), None))
    starts[len(code)] = len(blocks)
    return tuple(blocks), starts

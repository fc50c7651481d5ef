"""Shifts, bit fields, bitwise functions, comparisons and selections."""

from collections.abc import Callable

import numpy as np

from tests.emulator.ptx.arithmetic import by_ufunc, elementwise
from tests.emulator.ptx.decoder import Decoder
from tests.emulator.ptx.number_types import BITS, PACKED, Array, Mask, is_float, is_signed, numpy_type, unpack
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.state import State, Step

_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _bitwise(function: np.ufunc) -> Callable[[State, Instruction], Step]:
    def bind(state: State, instruction: Instruction) -> Step:
        return by_ufunc(state, instruction, function, *[instruction.types[0]] * len(instruction.operands))

    return bind


def _constant(operand: str) -> int | None:
    return None if operand.startswith("%") else int(operand.rstrip("U"), 0)


def _shift(function: np.ufunc, arithmetic: bool) -> Callable[[State, Instruction], Step]:
    """Bind a shift; numpy, like PTX, shifts by more than the width to 0, or to the sign."""

    def bind(state: State, instruction: Instruction) -> Step:
        bits = BITS[instruction.types[0]]
        ptx_type = f"{'s' if arithmetic and is_signed(instruction.types[0]) else 'u'}{bits}"
        if bits == 32 or _constant(instruction.operands[2]) is not None:
            return by_ufunc(state, instruction, function, ptx_type, ptx_type, ptx_type)
        if bits == 64:
            dtype = numpy_type(ptx_type)
            return elementwise(state, instruction, lambda a, n: function(a, n.astype(dtype)), ptx_type, ptx_type, "u32")
        return elementwise(
            state, instruction, lambda a, n: function(a.astype(np.int64), n.astype(np.int64)), ptx_type, ptx_type, "u32"
        )

    return bind


def _funnel_shift(state: State, instruction: Instruction) -> Step:
    left, wrap = instruction.has("l"), instruction.has("wrap")

    def compute(low: Array, high: Array, count: Array) -> Array:
        both = high.astype(np.uint64) << np.uint64(32) | low
        n = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
        return (both << n) >> np.uint64(32) if left else both >> n

    return elementwise(state, instruction, compute, "u32", "u32", "u32", "u32")


def _low_ones(count: Array) -> Array:
    """Return 64-bit numbers whose lowest `count` bits are set; numpy shifts by 64 to 0."""
    return ~np.asarray(~np.uint64(0) << count)


def _extract(state: State, instruction: Instruction) -> Step:
    ptx_type = instruction.types[0]
    bits = BITS[ptx_type]

    def compute(a: Array, start: Array, length: Array) -> Array:
        start, length = start.astype(np.int64) & 255, length.astype(np.int64) & 255
        field = a.astype(np.int64).view(np.uint64) >> np.minimum(start, 63).astype(np.uint64)
        kept = np.clip(length, 0, np.maximum(bits - start, 0))
        ones = _low_ones(kept.astype(np.uint64))
        if not is_signed(ptx_type):
            return np.where(length == 0, np.uint64(0), field & ones)
        sign_at = np.minimum(start + length - 1, bits - 1)
        sign = (a.astype(np.int64) >> np.clip(sign_at, 0, 63)) & 1
        return np.where(length == 0, np.uint64(0), (field & ones) | np.where(sign == 1, ~ones, np.uint64(0)))

    start, length = (_constant(operand) for operand in instruction.operands[2:])
    if start is not None and length is not None and 0 < length <= bits - start and not is_signed(ptx_type):
        out = state.registers.write(instruction.operands[0], ptx_type)
        a = state.registers.read(instruction.operands[1], ptx_type)
        shift, ones = out.dtype.type(start), out.dtype.type((1 << length) - 1)

        def step(mask: Mask) -> None:
            np.bitwise_and(a >> shift, ones, out, where=mask)

        return step
    return elementwise(state, instruction, compute, ptx_type, ptx_type, "u32", "u32")


def _insert(state: State, instruction: Instruction) -> Step:
    ptx_type = f"u{BITS[instruction.types[0]]}"

    def compute(field: Array, into: Array, start: Array, length: Array) -> Array:
        start, length = start.astype(np.uint64) & np.uint64(255), length.astype(np.uint64) & np.uint64(255)
        place = _low_ones(length) << start
        return np.asarray((into & ~place) | ((field.astype(np.uint64) << start) & place))

    return elementwise(state, instruction, compute, ptx_type, ptx_type, ptx_type, "u32", "u32")


def _permute(state: State, instruction: Instruction) -> Step:
    def compute(a: Array, b: Array, selector: Array) -> Array:
        both = b.astype(np.uint64) << np.uint64(32) | a
        result: Array = np.zeros(a.shape, np.uint64)
        for at in range(4):
            chosen = (selector.astype(np.uint64) >> np.uint64(4 * at)) & np.uint64(15)
            byte = (both >> ((chosen & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            result |= np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * at)
        return result

    return elementwise(state, instruction, compute, "u32", "u32", "u32", "u32")


def _lookup(state: State, instruction: Instruction) -> Step:
    table = int(instruction.operands[4], 0)

    def compute(a: Array, b: Array, c: Array, _: Array) -> Array:
        result: Array = np.zeros(a.shape, np.uint32)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return elementwise(state, instruction, compute, *["u32"] * 5)


def _bits_of(a: Array) -> Array:
    """Return the bits, [threads, width], lowest first."""
    places = np.arange(a.itemsize * 8).astype(a.dtype)
    return np.asarray((a[:, None] >> places) & a.dtype.type(1))


def _leading_zeros(a: Array) -> Array:
    bits: Array = _bits_of(a)[:, ::-1]
    return np.asarray(np.where(bits.any(1), bits.argmax(1), bits.shape[1]))


def _ones(a: Array) -> Array:
    return np.asarray(_bits_of(a).sum(1))


def _reversed(a: Array) -> Array:
    places = np.arange(a.itemsize * 8).astype(a.dtype)
    backwards: Array = _bits_of(a)[:, ::-1] << places
    return np.asarray(backwards.sum(1, dtype=a.dtype))


def _count(function: Callable[[Array], Array]) -> Callable[[State, Instruction], Step]:
    def bind(state: State, instruction: Instruction) -> Step:
        return elementwise(state, instruction, function, "u32", f"u{BITS[instruction.types[0]]}")

    return bind


def _reverse(state: State, instruction: Instruction) -> Step:
    ptx_type = f"u{BITS[instruction.types[0]]}"
    return elementwise(state, instruction, _reversed, ptx_type, ptx_type)


def _select(state: State, instruction: Instruction) -> Step:
    ptx_type = f"b{BITS[instruction.types[0]]}"
    registers = state.registers
    out = registers.write(instruction.operands[0], ptx_type)
    yes, no = (registers.read(operand, ptx_type) for operand in instruction.operands[1:3])
    choice = registers.read(instruction.operands[3], "pred")
    safe = instruction.operands[0] != instruction.operands[1]

    def step(mask: Mask) -> None:
        if mask is True and safe:
            np.copyto(out, no)
            np.copyto(out, yes, where=choice)
        else:
            np.copyto(out, np.where(choice, yes, no), where=mask)

    return step


def _compare(state: State, instruction: Instruction) -> Step:
    name, *combination = (modifier for modifier in instruction.modifiers if modifier != "ftz")
    ptx_type = instruction.types[0]
    floats = is_float(ptx_type)
    if (ptx_type in PACKED) != ("|" in instruction.operands[0]):
        raise instruction.refused("number of predicates")
    direct = name in _COMPARISONS and not combination and ptx_type != "bf16" and ptx_type not in PACKED
    if direct and not (floats and name == "ne"):
        return by_ufunc(state, instruction, _COMPARISONS[name], "pred", ptx_type, ptx_type)
    unordered_too = floats and name not in _COMPARISONS and name not in ("num", "nan")
    if not floats and name not in _COMPARISONS:
        raise instruction.refused("comparison of integers")
    if len(combination) != len(instruction.operands) - 3 or len(combination) > 1:
        raise instruction.refused("operands")

    def compute(left: Array, right: Array, *other: Array) -> Array:
        a, b = unpack(left, ptx_type), unpack(right, ptx_type)
        unordered = np.isnan(a) | np.isnan(b) if floats else np.zeros(a.shape, bool)
        if name in ("num", "nan"):
            result = ~unordered if name == "num" else unordered
        elif unordered_too:
            result = _COMPARISONS[name[:-1]](a, b) | unordered
        else:
            result = _COMPARISONS[name](a, b) & ~unordered
        return _COMBINATIONS[combination[0]](result, *other) if combination else result

    if ptx_type in PACKED:
        return _compare_both(state, instruction, compute)
    types = ["pred", ptx_type, ptx_type, *["pred"] * len(combination)]
    return elementwise(state, instruction, compute, *types)


def _compare_both(state: State, instruction: Instruction, function: Callable[..., Array]) -> Step:
    """Bind a comparison of packed numbers, which writes one predicate for the lower and one for the upper."""
    if len(instruction.operands) != 3:
        raise instruction.refused("operands")
    outs = [state.registers.write(name, "pred") for name in instruction.operands[0].split("|")]
    left, right = (state.registers.read(operand, instruction.types[0]) for operand in instruction.operands[1:])

    def step(mask: Mask) -> None:
        both = function(left, right)
        for half, out in enumerate(outs):
            np.copyto(out, both[half::2], where=mask)

    return step


_BITWISE = "pred b16 b32 b64"
_SIZES = "b16 b32 b64 u16 u32 u64 s16 s32 s64"
_VALUES = f"{_SIZES} f16 bf16 f32 f64"

DECODERS = {
    "and": Decoder(_bitwise(np.bitwise_and), "", _BITWISE, (3,)),
    "or": Decoder(_bitwise(np.bitwise_or), "", _BITWISE, (3,)),
    "xor": Decoder(_bitwise(np.bitwise_xor), "", _BITWISE, (3,)),
    "not": Decoder(_bitwise(np.invert), "", _BITWISE, (2,)),
    "shl": Decoder(_shift(np.left_shift, False), "", "b16 b32 b64", (3,)),
    "shr": Decoder(_shift(np.right_shift, True), "", _SIZES, (3,)),
    "shf": Decoder(_funnel_shift, "l r wrap clamp", "b32", (4,)),
    "bfe": Decoder(_extract, "", "u32 s32 u64 s64", (4,)),
    "bfi": Decoder(_insert, "", "b32 b64", (5,)),
    "prmt": Decoder(_permute, "", "b32", (4,)),
    "lop3": Decoder(_lookup, "", "b32", (5,)),
    "clz": Decoder(_count(_leading_zeros), "", "b32 b64", (2,)),
    "popc": Decoder(_count(_ones), "", "b32 b64", (2,)),
    "brev": Decoder(_reverse, "", "b32 b64", (2,)),
    "selp": Decoder(_select, "", _VALUES, (4,)),
    "setp": Decoder(
        _compare,
        " ".join(_COMPARISONS) + " equ neu ltu leu gtu geu num nan and or xor ftz",
        f"{_VALUES} f16x2 bf16x2",
        (3, 4),
    ),
}

"""Arithmetic on integers and floats: add, multiply, divide, compare for the larger, and the special functions."""

from collections.abc import Callable

import numpy as np

from tests.emulator.ptx.decoder import Decoder
from tests.emulator.ptx.errors import UnknownInstruction
from tests.emulator.ptx.number_types import (
    BITS,
    SIGNED,
    UNSIGNED,
    Array,
    Mask,
    is_float,
    is_signed,
    numpy_type,
    pack,
    unpack,
)
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.state import State, Step

_DIRECT = ("f32", "f64", "f32x2", "f16", "f16x2")  # numpy computes with these as they are


def elementwise(state: State, instruction: Instruction, function: Callable[..., Array], *types: str) -> Step:
    """Return a step that applies `function` to the operands, read as `types[1:]`, and writes `types[0]`."""
    out = state.registers.write(instruction.operands[0], types[0])
    pairs = zip(instruction.operands[1:], types[1:], strict=True)
    sources = [state.registers.read(operand, ptx_type) for operand, ptx_type in pairs]
    lanes = out.size // state.threads

    def step(mask: Mask) -> None:
        np.copyto(out, function(*sources), where=state.lanes(mask, lanes), casting="unsafe")

    return step


def by_ufunc(state: State, instruction: Instruction, function: np.ufunc, *types: str) -> Step:
    """Return the step of `elementwise` for a ufunc, which writes its result and skips masked threads by itself."""
    out = state.registers.write(instruction.operands[0], types[0])
    pairs = zip(instruction.operands[1:], types[1:], strict=True)
    sources = [state.registers.read(operand, ptx_type) for operand, ptx_type in pairs]
    lanes = out.size // state.threads
    if lanes > 1:
        return lambda mask: function(*sources, out=out, where=state.lanes(mask, lanes))
    if len(sources) == 1:
        source = sources[0]
        return lambda mask: function(source, out, where=mask)
    left, right = sources
    return lambda mask: function(left, right, out=out, where=mask)


def _floats(state: State, instruction: Instruction, function: Callable[..., Array]) -> Step:
    """Return a step for a function of any float type, saturated if the instruction has `.sat`."""
    types = (instruction.types[-1],) * len(instruction.operands)
    if len(instruction.types) == 2:  # the last operand and the result are f32, the others f16 or bf16
        if instruction.types[0] != "f32" or instruction.types[1] not in ("f16", "bf16"):
            raise instruction.refused("types")
        types = ("f32", *instruction.types[1:] * (len(instruction.operands) - 2), "f32")
    saturate = instruction.has("sat")
    if isinstance(function, np.ufunc) and types[0] in _DIRECT and len(set(types)) == 1 and not saturate:
        return by_ufunc(state, instruction, function, *types)

    def computed(*sources: Array) -> Array:
        values = [unpack(source, ptx_type) for source, ptx_type in zip(sources, types[1:], strict=True)]
        if len(instruction.types) == 2:
            values = [value.astype(np.float32) for value in values]
        result = function(*values)
        return pack(np.clip(np.nan_to_num(result, posinf=1), 0, 1) if saturate else result, types[0])

    return elementwise(state, instruction, computed, *types)


def _sum(function: np.ufunc) -> Callable[[State, Instruction], Step]:
    def bind(state: State, instruction: Instruction) -> Step:
        ptx_type = instruction.types[-1]
        if instruction.has("cc"):
            return _sum_with_carry(state, instruction, function)
        if is_float(ptx_type):
            return _floats(state, instruction, function)
        return by_ufunc(state, instruction, function, ptx_type, ptx_type, ptx_type)

    return bind


def _sum_with_carry(state: State, instruction: Instruction, function: np.ufunc) -> Step:
    if function is not np.add or BITS[instruction.types[0]] != 32:
        raise instruction.refused("carry")

    def add(a: Array, b: Array) -> Array:
        total = a.astype(np.uint64) + b
        state.carry = (total >> np.uint64(32)).astype(np.uint32)
        return total.astype(np.uint32)

    return elementwise(state, instruction, add, "u32", "u32", "u32")


def _larger(number: np.ufunc, nan: np.ufunc) -> Callable[[State, Instruction], Step]:
    """Bind min or max: `number` ignores NaN, `nan` returns it."""

    def bind(state: State, instruction: Instruction) -> Step:
        ptx_type = instruction.types[-1]
        function = nan if instruction.has("NaN") or not is_float(ptx_type) else number
        if instruction.has("xorsign"):
            return _floats(state, instruction, _with_product_sign(function))
        if len(instruction.operands) == 4:
            if ptx_type != "f32":
                raise instruction.refused("4 operands")
            return elementwise(state, instruction, lambda a, b, c: function(function(a, b), c), *["f32"] * 4)
        if is_float(ptx_type):
            return _floats(state, instruction, function)
        return by_ufunc(state, instruction, function, ptx_type, ptx_type, ptx_type)

    return bind


def _with_product_sign(function: np.ufunc) -> Callable[[Array, Array], Array]:
    def compute(a: Array, b: Array) -> Array:
        sign = np.where(np.signbit(a) ^ np.signbit(b), -1, 1).astype(a.dtype)
        return np.asarray(np.copysign(function(np.abs(a), np.abs(b)), sign))

    return compute


def _double(ptx_type: str) -> str:
    return f"{'s' if is_signed(ptx_type) else 'u'}{2 * BITS[ptx_type]}"


def _high(a: Array, b: Array) -> Array:
    """Return the upper half of the product."""
    bits = a.itemsize * 8
    if bits == 64:
        return _high_64(a, b)
    wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * bits]
    high: Array = (a.astype(wide) * b) >> wide.type(bits)
    return high.astype(a.dtype)


def _high_64(a: Array, b: Array) -> Array:
    """Return the upper half of a 64-bit product, from four 32-bit ones, corrected by 2**64 for negative factors."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = np.ascontiguousarray(a).view(np.uint64), np.ascontiguousarray(b).view(np.uint64)
    x_low, x_high, y_low, y_high = x & low, x >> half, y & low, y >> half
    middle = x_high * y_low + (x_low * y_low >> half)
    other = x_low * y_high + (middle & low)
    high: Array = x_high * y_high + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def _multiply(state: State, instruction: Instruction) -> Step:
    ptx_type = instruction.types[-1]
    if is_float(ptx_type):
        return _floats(state, instruction, np.multiply)
    if instruction.has("hi"):
        return elementwise(state, instruction, _high, ptx_type, ptx_type, ptx_type)
    if not instruction.has("wide"):
        return by_ufunc(state, instruction, np.multiply, ptx_type, ptx_type, ptx_type)
    wide = numpy_type(_double(ptx_type))
    return elementwise(state, instruction, lambda a, b: a.astype(wide) * b, _double(ptx_type), ptx_type, ptx_type)


def _multiply_add(state: State, instruction: Instruction) -> Step:
    ptx_type = instruction.types[-1]
    if is_float(ptx_type):
        return _fused(state, instruction)
    if instruction.has("cc"):
        return _with_carry_out(state, instruction)
    if instruction.has("wide"):
        double = _double(ptx_type)
        wide = numpy_type(double)
        return elementwise(
            state, instruction, lambda a, b, c: a.astype(wide) * b + c, double, ptx_type, ptx_type, double
        )
    if instruction.has("hi"):
        return elementwise(state, instruction, lambda a, b, c: _high(a, b) + c, *[ptx_type] * 4)
    return elementwise(state, instruction, lambda a, b, c: a * b + c, *[ptx_type] * 4)


def _product_half(instruction: Instruction, a: Array, b: Array) -> Array:
    product = a.astype(np.uint64) * b
    return product >> np.uint64(32) if instruction.has("hi") else product & np.uint64(0xFFFFFFFF)


def _with_carry_out(state: State, instruction: Instruction) -> Step:
    def compute(a: Array, b: Array, c: Array) -> Array:
        total = _product_half(instruction, a, b) + c
        state.carry = (total >> np.uint64(32)).astype(np.uint32)
        return total.astype(np.uint32)

    return elementwise(state, instruction, compute, "u32", "u32", "u32", "u32")


def _with_carry_in(state: State, instruction: Instruction) -> Step:
    def compute(a: Array, b: Array, c: Array) -> Array:
        total = _product_half(instruction, a, b) + c + state.carry
        if instruction.has("cc"):
            state.carry = (total >> np.uint64(32)).astype(np.uint32)
        return total.astype(np.uint32)

    return elementwise(state, instruction, compute, "u32", "u32", "u32", "u32")


def _fused(state: State, instruction: Instruction) -> Step:
    """Bind fma. The product is exact except in f64; the sum is rounded to a wider type, then to the instruction's."""
    ptx_type = instruction.types[-1]
    if ptx_type not in ("f32", "f32x2") or instruction.has("sat"):
        wide = np.longdouble if ptx_type == "f64" else np.float64
        return _floats(state, instruction, lambda a, b, c: a.astype(wide) * b + c)
    registers = state.registers
    out = registers.write(instruction.operands[0], ptx_type)
    a, b, c = (registers.read(operand, ptx_type) for operand in instruction.operands[1:])
    lanes = 2 if ptx_type == "f32x2" else 1
    product = registers.scratch(lanes)

    def step(mask: Mask) -> None:
        np.multiply(a, b, product, dtype=np.float64)
        np.add(product, c, product)
        np.copyto(out, product, where=state.lanes(mask, lanes), casting="same_kind")

    return step


def _quotient(a: Array, b: Array) -> Array:
    divisor = np.where(b == 0, b.dtype.type(1), b)
    return (a - np.fmod(a, divisor)) // divisor


def _remainder(a: Array, b: Array) -> Array:
    return np.asarray(np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def _divide(state: State, instruction: Instruction) -> Step:
    ptx_type = instruction.types[-1]
    if is_float(ptx_type):
        return _floats(state, instruction, np.divide)
    return elementwise(state, instruction, _quotient, ptx_type, ptx_type, ptx_type)


def _rest(state: State, instruction: Instruction) -> Step:
    ptx_type = instruction.types[-1]
    return elementwise(state, instruction, _remainder, ptx_type, ptx_type, ptx_type)


def _of_one(function: Callable[..., Array]) -> Callable[[State, Instruction], Step]:
    def bind(state: State, instruction: Instruction) -> Step:
        ptx_type = instruction.types[-1]
        if is_float(ptx_type):
            return _floats(state, instruction, function)
        if not isinstance(function, np.ufunc):
            raise UnknownInstruction(instruction.text)
        return by_ufunc(state, instruction, function, ptx_type, ptx_type)

    return bind


def _reciprocal(a: Array) -> Array:
    return 1 / a.astype(np.float64)


def _reciprocal_root(a: Array) -> Array:
    return 1 / np.sqrt(a.astype(np.float64))


_INTEGERS = "b16 b32 b64 u16 u32 u64 s16 s32 s64"
_FLOATS = "f16 bf16 f16x2 bf16x2 f32 f32x2 f64"
_ALL = f"{_INTEGERS} s16x2 u16x2 {_FLOATS}"
_ROUNDING = "rn ftz sat"

DECODERS = {
    "add": Decoder(_sum(np.add), f"{_ROUNDING} cc", _ALL, (3,), (1, 2)),
    "sub": Decoder(_sum(np.subtract), _ROUNDING, _ALL, (3,), (1, 2)),
    "mul": Decoder(_multiply, f"{_ROUNDING} lo hi wide", _ALL, (3,)),
    "mad": Decoder(_multiply_add, f"{_ROUNDING} lo hi wide cc", _ALL, (4,)),
    "madc": Decoder(_with_carry_in, "lo hi cc", "u32 s32", (4,)),
    "fma": Decoder(_fused, _ROUNDING, _FLOATS, (4,), (1, 2)),
    "div": Decoder(_divide, f"{_ROUNDING} approx full", f"{_INTEGERS} f32 f64", (3,)),
    "rem": Decoder(_rest, "", _INTEGERS, (3,)),
    "max": Decoder(_larger(np.fmax, np.maximum), "ftz NaN xorsign abs", _ALL, (3, 4)),
    "min": Decoder(_larger(np.fmin, np.minimum), "ftz NaN xorsign abs", _ALL, (3, 4)),
    "neg": Decoder(_of_one(np.negative), "ftz", _ALL, (2,)),
    "abs": Decoder(_of_one(np.absolute), "ftz", _ALL, (2,)),
    "ex2": Decoder(_of_one(np.exp2), "approx ftz", _FLOATS, (2,)),
    "lg2": Decoder(_of_one(np.log2), "approx ftz", "f32", (2,)),
    "sin": Decoder(_of_one(np.sin), "approx ftz", "f32", (2,)),
    "cos": Decoder(_of_one(np.cos), "approx ftz", "f32", (2,)),
    "tanh": Decoder(_of_one(np.tanh), "approx ftz", _FLOATS, (2,)),
    "sqrt": Decoder(_of_one(np.sqrt), "rn approx ftz", "f32 f64", (2,)),
    "rsqrt": Decoder(_of_one(_reciprocal_root), "approx ftz", "f32 f64", (2,)),
    "rcp": Decoder(_of_one(_reciprocal), "rn approx ftz", "f32 f64", (2,)),
}

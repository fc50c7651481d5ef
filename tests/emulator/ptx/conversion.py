"""Moves between registers: unchanged, packed, unpacked, or converted to another type."""

from collections.abc import Callable

import numpy as np

from tests.emulator.ptx.arithmetic import elementwise
from tests.emulator.ptx.decoder import Decoder
from tests.emulator.ptx.number_types import BITS, UNSIGNED, Array, Mask, is_float, numpy_type, pack, unpack
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.state import State, Step, register_list

_ROUNDING: dict[str, np.ufunc] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _move(state: State, instruction: Instruction) -> Step:
    ptx_type = instruction.types[0]
    target, source = instruction.operands
    if ptx_type == "pred":
        return _copy(state, target, source, "pred")
    ptx_type = f"b{BITS[ptx_type]}"
    if source.startswith("{"):
        return _join(state, target, register_list(source), ptx_type)
    if target.startswith("{"):
        return _split(state, register_list(target), source, ptx_type)
    return _copy(state, target, source, ptx_type)


def _copy(state: State, target: str, source: str, ptx_type: str) -> Step:
    out, value = state.registers.write(target, ptx_type), state.registers.read(source, ptx_type)
    return lambda mask: np.copyto(out, value, where=mask)


def _join(state: State, target: str, sources: list[str], ptx_type: str) -> Step:
    width = BITS[ptx_type] // len(sources)
    out = state.registers.write(target, ptx_type)
    parts = [out.view(UNSIGNED[width])[at :: len(sources)] for at in range(len(sources))]
    values = [state.registers.read(source, f"b{width}") for source in sources]

    def step(mask: Mask) -> None:
        for part, value in zip(parts, values, strict=True):
            np.copyto(part, value, where=mask)

    return step


def _split(state: State, targets: list[str], source: str, ptx_type: str) -> Step:
    width = BITS[ptx_type] // len(targets)
    value = state.registers.read(source, ptx_type)
    whole = np.ascontiguousarray(value) if not value.flags.c_contiguous else value
    pairs = [
        (state.registers.write(target, f"b{width}"), whole.view(UNSIGNED[width])[at :: len(targets)])
        for at, target in enumerate(targets)
        if target != "_"
    ]

    def step(mask: Mask) -> None:
        for out, part in pairs:
            np.copyto(out, part, where=mask)

    return step


def _convert(state: State, instruction: Instruction) -> Step:
    to, source = instruction.types
    if to in ("f16x2", "bf16x2"):
        return _convert_pair(state, instruction)
    if to == "tf32":
        if source != "f32" or not instruction.has("rna"):
            raise instruction.refused("rounding")
        return elementwise(state, instruction, _to_tf32, "tf32", "f32")
    rounding = instruction.one_of(*_ROUNDING)
    if instruction.has("rz", "rna") or (is_float(source) and not is_float(to) and rounding is None):
        raise instruction.refused("rounding")
    if is_float(to) and instruction.has("sat"):
        raise instruction.refused("saturation")
    if is_float(source) and not is_float(to):
        assert rounding is not None
        whole = _ROUNDING[rounding]
        return _into(state, instruction, lambda a: _to_integer(whole(unpack(a, source)), to))
    if is_float(source):
        round_to_whole: Callable[[Array], Array] = _ROUNDING[rounding] if rounding else np.asarray
        return _into(state, instruction, lambda a: pack(round_to_whole(unpack(a, source)), to))
    if is_float(to):
        return _into(state, instruction, lambda a: pack(a.astype(np.float64), to))
    if instruction.has("sat"):
        return _into(state, instruction, lambda a: _saturated(a, to))
    return _between_integers(state, instruction)


def _into(state: State, instruction: Instruction, function: Callable[[Array], Array]) -> Step:
    """Return a step that applies `function` and writes to a register that may be wider than the target type."""
    to, source = instruction.types
    out = state.registers.native(instruction.operands[0])
    value = state.registers.read(instruction.operands[1], source)
    if out.itemsize * 8 == BITS[to]:
        out = out.view(numpy_type(to))
    return lambda mask: np.copyto(out, function(value), where=mask, casting="unsafe")


def _between_integers(state: State, instruction: Instruction) -> Step:
    to, source = instruction.types
    out = state.registers.native(instruction.operands[0])
    value = state.registers.read(instruction.operands[1], source)
    dtype = numpy_type(to)
    if out.dtype.itemsize == dtype.itemsize:
        return lambda mask: np.copyto(out, value, where=mask, casting="unsafe")
    return lambda mask: np.copyto(out, value.astype(dtype), where=mask, casting="unsafe")


def _convert_pair(state: State, instruction: Instruction) -> Step:
    to = instruction.types[0]
    if instruction.types[1] != "f32" or len(instruction.operands) != 3 or not instruction.has("rn"):
        raise instruction.refused("form")
    half = to[:-2]
    dtype = numpy_type(half)

    def compute(high: Array, low: Array) -> Array:
        pair = np.empty((len(high), 2), dtype)
        pair[:, 0], pair[:, 1] = pack(low, half), pack(high, half)
        return pair.view(np.uint32)[:, 0]

    return elementwise(state, instruction, compute, "b32", "f32", "f32")


def _to_tf32(values: Array) -> Array:
    """Round to ten bits of mantissa, ties away from zero."""
    bits = (values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    bits[np.isnan(values)] = 0x7FFFE000
    return bits


def _to_integer(values: Array, to: str) -> Array:
    """Convert whole floats to integers; NaN becomes 0, and values out of range are clamped."""
    dtype = numpy_type(to)
    info = np.iinfo(dtype)
    numbers = np.where(np.isnan(values), 0, values).astype(np.float64)
    fits = (numbers < float(info.max)) & (numbers > float(info.min))
    result = np.where(numbers > 0, info.max, info.min).astype(dtype)
    result[numbers == 0] = 0
    result[fits] = numbers[fits].astype(dtype)
    return result


def _saturated(values: Array, to: str) -> Array:
    info = np.iinfo(numpy_type(to))
    low = max(int(info.min), int(np.iinfo(values.dtype).min))
    high = min(int(info.max), int(np.iinfo(values.dtype).max))
    return np.clip(values, low, high).astype(info.dtype)


_INTEGERS = "u8 u16 u32 u64 s8 s16 s32 s64"

DECODERS = {
    "mov": Decoder(_move, "", "pred b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64", (2,)),
    "cvt": Decoder(
        _convert,
        "rn rz rna rni rzi rmi rpi ftz sat",
        f"{_INTEGERS} f16 bf16 f32 f64 f16x2 bf16x2 tf32",
        (2, 3),
        (2,),
    ),
    "cvta": Decoder(_move, "to global local shared", "u64", (2,)),
}

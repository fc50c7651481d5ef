"""Loads, stores, atomics and asynchronous copies."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator.ptx.decoder import Decoder
from tests.emulator.ptx.global_memory import GlobalMemory
from tests.emulator.ptx.local_memory import LocalMemory
from tests.emulator.ptx.number_types import (
    BITS,
    CARRIER,
    UNSIGNED,
    Array,
    Mask,
    from_bfloat16,
    is_signed,
    numpy_type,
    to_bfloat16,
)
from tests.emulator.ptx.program import Instruction
from tests.emulator.ptx.shared_memory import SharedMemory
from tests.emulator.ptx.state import LOCAL_WINDOW, SHARED_WINDOW, State, Step, bind_address, register_list

_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0}
Memory = GlobalMemory | SharedMemory | LocalMemory
Load = Callable[[Mask], Array]
Store = Callable[[Array, Mask], None]


def _space(instruction: Instruction) -> str:
    spaces = [modifier.split("::")[0] for modifier in instruction.modifiers]
    return next((space for space in spaces if space in _WINDOWS), "generic")


def _behind(state: State, address: Array, instruction: Instruction) -> tuple[Memory, int]:
    """Return the memory in which all of these generic addresses lie, and the start of its window."""
    windows = np.unique(address & np.int64(SHARED_WINDOW | LOCAL_WINDOW)).tolist()
    if len(windows) > 1:
        raise instruction.refused("generic addresses of several spaces")
    if windows == [SHARED_WINDOW]:
        return state.shared, SHARED_WINDOW
    return (state.local, LOCAL_WINDOW) if windows == [LOCAL_WINDOW] else (state.global_memory, 0)


def _loader(state: State, instruction: Instruction, operand: str, size: int) -> Load:
    space = _space(instruction)
    addresses = bind_address(state, instruction, operand, _WINDOWS.get(space, 0))
    if space == "global":
        return lambda mask: state.global_memory.load(addresses(mask), size, instruction, mask)
    if space == "shared":
        return lambda mask: state.shared.load(addresses(mask), size, instruction, mask)
    if space == "local":
        return lambda mask: state.local.load(addresses(mask), size, instruction, mask)

    def load(mask: Mask) -> Array:
        address = addresses(mask)
        memory, window = _behind(state, address, instruction)
        return memory.load(address - np.int64(window), size, instruction, mask)

    return load


def _storer(state: State, instruction: Instruction, operand: str) -> Store:
    space = _space(instruction)
    addresses = bind_address(state, instruction, operand, _WINDOWS.get(space, 0))
    if space == "global":
        return lambda values, mask: state.global_memory.store(addresses(mask), values, instruction, mask)
    if space == "shared":
        return lambda values, mask: state.shared.store(addresses(mask), values, instruction, mask)
    if space == "local":
        return lambda values, mask: state.local.store(addresses(mask), values, instruction, mask)

    def store(values: Array, mask: Mask) -> None:
        address = addresses(mask)
        memory, window = _behind(state, address, instruction)
        memory.store(address - np.int64(window), values, instruction, mask)

    return store


def _load(state: State, instruction: Instruction) -> Step:
    if instruction.has("param"):
        return _load_parameter(state, instruction)
    ptx_type = instruction.types[0]
    item = BITS[ptx_type] // 8
    names = register_list(instruction.operands[0])
    _check_vector(instruction, names)
    load = _loader(state, instruction, instruction.operands[1], item * len(names))
    dtype = numpy_type(ptx_type) if is_signed(ptx_type) else UNSIGNED[item * 8]
    outs = [state.registers.native(name) for name in names]
    if len(outs) == 1:
        return _one_loaded(load, outs[0], dtype)

    def step(mask: Mask) -> None:
        values = load(mask).view(dtype).reshape(-1, len(outs))
        for at, out in enumerate(outs):
            out[slice(None) if mask is True else mask] = values[:, at]

    return step


def _one_loaded(load: Load, out: Array, dtype: np.dtype[np.generic]) -> Step:
    def step(mask: Mask) -> None:
        values = load(mask).view(dtype)
        if mask is True:
            np.copyto(out, values, casting="unsafe")
        else:
            out[mask] = values

    return step


def _check_vector(instruction: Instruction, names: list[str]) -> None:
    vector = instruction.one_of("v2", "v4", "v8")
    if len(names) != (int(vector[1:]) if vector else 1):
        raise instruction.refused("number of registers")


def _load_parameter(state: State, instruction: Instruction) -> Step:
    name = instruction.operands[1].strip("[] ")
    if name not in state.parameters:
        raise instruction.refused("parameter")
    out, value = state.registers.native(instruction.operands[0]), state.parameters[name]
    if out.itemsize < value.itemsize or value.itemsize * 8 != BITS[instruction.types[0]]:
        raise instruction.refused("size of the parameter")
    if is_signed(instruction.types[0]):
        value = value.view(numpy_type(instruction.types[0]))
    return lambda mask: np.copyto(out, value, where=mask, casting="unsafe")


def _store(state: State, instruction: Instruction) -> Step:
    item = BITS[instruction.types[0]] // 8
    names = register_list(instruction.operands[1])
    _check_vector(instruction, names)
    store = _storer(state, instruction, instruction.operands[0])
    sources = [state.registers.read(name, f"u{item * 8}") for name in names]
    if len(sources) == 1:
        source = sources[0]
        return lambda mask: store(source if mask is True else source[mask], mask)
    carrier = CARRIER[item * len(sources)]

    def step(mask: Mask) -> None:
        values = np.stack(sources if mask is True else [source[mask] for source in sources], 1)
        store(values.view(carrier)[:, 0], mask)

    return step


_ATOMICS: dict[str, Callable[[Any, Any], object]] = {
    "add": operator.add,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "exch": lambda old, value: value,
}


def _atomic(state: State, instruction: Instruction) -> Step:
    """Bind an atomic operation; it runs one thread after the other, in order."""
    operation = instruction.one_of(*_ATOMICS, "cas")
    returns = instruction.opcode == "atom"
    ptx_type = instruction.types[0]
    dtype, size = numpy_type(ptx_type), BITS[ptx_type] // 8
    space = _space(instruction)
    operands = instruction.operands[1:] if returns else instruction.operands
    if operation is None or space not in ("global", "shared") or len(operands) != (3 if operation == "cas" else 2):
        raise instruction.refused("form of the atomic")
    addresses = bind_address(state, instruction, operands[0], _WINDOWS[space])
    values = [state.registers.read(operand, ptx_type) for operand in operands[1:]]
    out = state.registers.write(instruction.operands[0], ptx_type) if returns else None

    def step(mask: Mask) -> None:
        memory: GlobalMemory | SharedMemory = state.global_memory if space == "global" else state.shared
        threads = np.arange(state.threads) if mask is True else np.flatnonzero(mask)
        before = np.empty(len(threads), dtype)
        for at, (thread, address) in enumerate(zip(threads, addresses(mask), strict=True)):
            elements, index = memory.update(int(address), size, instruction, int(thread))
            place = elements.view(dtype)
            old = before[at] = place[index]
            if operation == "cas":
                place[index] = values[1][thread] if old == values[0][thread] else old
            elif ptx_type == "bf16":
                pair = from_bfloat16(np.array([old, values[0][thread]]))
                place[index] = to_bfloat16(np.array([_ATOMICS[operation](*pair)]))[0]
            else:
                place[index] = _ATOMICS[operation](old, values[0][thread])
        if out is not None:
            out[threads] = before

    return step


def _copy_async(state: State, instruction: Instruction) -> Step:
    if instruction.has("commit_group"):
        return state.copies.commit
    if instruction.has("wait_group"):
        keep = int(instruction.operands[0])
        return lambda mask: state.copies.wait(keep, mask)
    if instruction.has("wait_all"):
        return _wait_for_all(state)
    if not (instruction.has("shared", "shared::cta") and instruction.has("global")):
        raise instruction.refused("form of the copy")
    return _launch_copy(state, instruction)


def _wait_for_all(state: State) -> Step:
    def step(mask: Mask) -> None:
        state.copies.commit(mask)
        state.copies.wait(0, mask)

    return step


def _launch_copy(state: State, instruction: Instruction) -> Step:
    size = int(instruction.operands[2], 0)
    target = bind_address(state, instruction, instruction.operands[0], SHARED_WINDOW)
    source = bind_address(state, instruction, instruction.operands[1])
    length = None
    if len(instruction.operands) > 3 and not instruction.operands[3].startswith("%rd"):
        length = state.registers.read(instruction.operands[3], "u32")

    def step(mask: Mask) -> None:
        index = state.shared.launch(target(mask), size, instruction, mask)
        address = source(mask)
        lengths = np.full(len(address), size) if length is None else (length if mask is True else length[mask])
        whole = lengths == size
        if whole.all():
            values = state.global_memory.load(address, size, instruction, mask)
        else:
            values = np.zeros(len(address), CARRIER[size])
            values[whole] = state.global_memory.load(address[whole], size, instruction, _narrowed(state, mask, whole))
            _load_parts(state, instruction, address, np.where(whole, 0, lengths), mask, values)
        state.copies.add(index, values, mask)

    return step


def _load_parts(
    state: State, instruction: Instruction, address: Array, lengths: Array, mask: Mask, values: Array
) -> None:
    """Load the first `lengths[i]` bytes of each `values[i]`."""
    for at in range(int(lengths.max(initial=0))):
        chosen = lengths > at
        part = _narrowed(state, mask, chosen)
        byte = state.global_memory.load(address[chosen] + at, 1, instruction, part)
        values.view(np.uint8).reshape(len(values), -1)[chosen, at] = byte


def _narrowed(state: State, mask: Mask, chosen: Array) -> Array:
    """Return the threads of the mask for which `chosen`, given for each thread of the mask, is true."""
    narrowed = np.zeros(state.threads, bool)
    narrowed[np.arange(state.threads)[chosen] if mask is True else np.flatnonzero(mask)[chosen]] = True
    return narrowed


_CACHE = (
    "ca cg cs lu wb wt L1::evict_first L1::evict_last L1::no_allocate L1::evict_normal L2::cache_hint L2::64B L2::128B "
    "L2::256B"
)
_SPACES = "global shared shared::cta local"
_ORDER = "volatile relaxed acquire release acq_rel weak gpu sys cta nc"
_TYPES = "b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64"
_OPERATIONS = " ".join(_ATOMICS) + " cas noftz"
_ATOMIC_TYPES = "b32 b64 u32 u64 s32 s64 f16 bf16 f32 f64"

DECODERS = {
    "ld": Decoder(_load, f"{_SPACES} param {_CACHE} {_ORDER} v2 v4 v8", _TYPES, (2, 3)),
    "st": Decoder(_store, f"{_SPACES} {_CACHE} {_ORDER} v2 v4 v8", _TYPES, (2, 3)),
    "atom": Decoder(_atomic, f"global shared shared::cta {_ORDER} {_OPERATIONS}", _ATOMIC_TYPES, (3, 4)),
    "red": Decoder(_atomic, f"global shared shared::cta {_ORDER} {_OPERATIONS}", _ATOMIC_TYPES, (2,)),
    "cp": Decoder(
        _copy_async,
        f"async commit_group wait_group wait_all shared shared::cta global {_CACHE}",
        "",
        (0, 1, 3, 4, 5),
        (0,),
    ),
}

"""The numpy types of PTX's types, and conversions for the one that numpy lacks, bfloat16."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = Any  # True where all threads take part (numpy's own way to say so), else a bool array [threads]

UNSIGNED: dict[int, np.dtype[Any]] = {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
SIGNED: dict[int, np.dtype[Any]] = {bits: np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
FLOAT: dict[int, np.dtype[Any]] = {bits: np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)}

# Two numbers in one register: the type of one of them.
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "s16x2": "s16", "u16x2": "u16", "f32x2": "f32"}

BITS = {"pred": 1, "bf16": 16, "tf32": 32, "f16x2": 32, "bf16x2": 32, "s16x2": 32, "u16x2": 32, "f32x2": 64}
BITS |= {f"{kind}{bits}": bits for kind in "bus" for bits in UNSIGNED} | {f"f{bits}": bits for bits in FLOAT}

# How many numbers a register of 32 bits holds as an operand of a matrix instruction.
PER_WORD = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4}

# An access of this many bytes is one element of this type; complex128 is only numpy's fastest carrier of sixteen bytes.
CARRIER: dict[int, np.dtype[Any]] = {1: UNSIGNED[8], 2: UNSIGNED[16], 4: UNSIGNED[32], 8: UNSIGNED[64]}
CARRIER |= {16: np.dtype("c16"), 32: np.dtype("V32")}


def is_float(ptx_type: str) -> bool:
    """Return whether it is a floating point type."""
    return ptx_type[0] == "f" or ptx_type.startswith("bf")


def is_signed(ptx_type: str) -> bool:
    """Return whether it is a signed integer type."""
    return ptx_type[0] == "s"


def numpy_type(ptx_type: str) -> np.dtype[Any]:
    """Return the numpy type of a PTX type's values (of a packed type, of one); for bfloat16 that of its bits."""
    if ptx_type == "pred":
        return np.dtype(bool)
    ptx_type = PACKED.get(ptx_type, ptx_type)
    bits = BITS[ptx_type]
    if ptx_type == f"f{bits}":
        return FLOAT[bits]
    return SIGNED[bits] if is_signed(ptx_type) else UNSIGNED[bits]


def from_bfloat16(bits: Array) -> Array:
    """Convert the 16 bits of bfloat16 numbers to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """Round to bfloat16, ties to even, and return the 16 bits; NaN is the one that the hardware writes."""
    bits = values.astype(np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FFF
    return rounded


def unpack(bits: Array, ptx_type: str) -> Array:
    """Convert an array from `Registers.read` to floats that numpy computes with."""
    return from_bfloat16(bits) if ptx_type in ("bf16", "bf16x2") else bits


def pack(values: Array, ptx_type: str) -> Array:
    """Convert floats back to the form of the registers, with rounding; the inverse of `unpack`."""
    return to_bfloat16(values) if ptx_type in ("bf16", "bf16x2") else values.astype(numpy_type(ptx_type))


def numbers_in_words(bits: Array, ptx_type: str) -> Array:
    """Convert words of 32 bits, operands of a matrix instruction, to float64 [..., numbers in a word]."""
    if ptx_type == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    shape = (*bits.shape, PER_WORD[ptx_type])
    if ptx_type == "bf16":
        return from_bfloat16(bits.view(np.uint16)).astype(np.float64).reshape(shape)
    dtype = np.dtype(np.float16) if ptx_type == "f16" else (SIGNED if ptx_type == "s8" else UNSIGNED)[8]
    return bits.view(dtype).astype(np.float64).reshape(shape)

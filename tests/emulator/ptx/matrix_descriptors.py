"""Matrices in shared memory that a 64-bit descriptor describes: the operands of `wgmma` and `tcgen05.mma`.

A matrix of `rows` (of A, or columns of B) by `inner` (the dimension that the product sums over) lies in units of 16
bytes: neighbours along the inner dimension, or along the rows where it is `transposed`. Eight units make a core matrix;
the descriptor says how far core matrices are apart, and how units are swizzled.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from tests.emulator.ptx.number_types import Array, numbers_in_words

_SWIZZLES_90 = {0: 0, 1: 7, 2: 3, 3: 1}  # bits 62 and 63: which bits of a unit's number are swizzled
_SWIZZLES_100 = {0: 0, 2: 7, 4: 3, 6: 1}  # bits 61 to 63


class Layout(NamedTuple):
    """All but the start of a descriptor.

    Args:
        leading: bytes from one core matrix to the next, along the dimension in which units are contiguous.
        stride: the same along the other one.
        swizzle: 0, 1, 3 or 7 for lines of 16 (none), 32, 64 or 128 bytes.
    """

    leading: int
    stride: int
    swizzle: int


def start_of(descriptors: Array) -> Array:
    """Return the offsets in shared memory of matrices, int64, from their descriptors, uint64."""
    return np.asarray((descriptors & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)


def layout_of(descriptor: int, blackwell: bool) -> Layout | None:
    """Return the layout that a descriptor says, or None where it has a form that is not known here."""
    swizzle = _SWIZZLES_100.get(descriptor >> 61) if blackwell else _SWIZZLES_90[descriptor >> 62]
    version, offset, rest = descriptor >> 46 & 7, descriptor >> 49 & 7, descriptor >> 52 & (1 << 9) - 1
    if swizzle is None or offset or rest or version != blackwell:
        return None
    return Layout((descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, swizzle)


def unit_offsets(start: Array, layout: Layout, rows: int, inner: int, size: int, transposed: bool) -> Array:
    """Return the offsets in shared memory of all units: `[n, rows, units]`, or `[n, units, inner]` if transposed.

    Args:
        start: `[n]` offsets of n matrices.
        size: bytes of an element.
    """
    offset = start[:, None, None] + _before_swizzle(layout, rows, inner, size, transposed)
    if layout.swizzle:
        offset ^= (offset >> 7 & layout.swizzle) << 4
    return offset


@cache
def _before_swizzle(layout: Layout, rows: int, inner: int, size: int, transposed: bool) -> Array:
    width, per_unit = layout.swizzle + 1, 16 // size
    if transposed:
        unit, k = np.arange(rows // per_unit)[:, None], np.arange(inner)
        if width == 1:
            return unit * layout.stride + k % 8 * 16 + k // 8 * layout.leading
        return unit % width * 16 + unit // width * layout.leading + k % 8 * 16 * width + k // 8 * layout.stride
    row, unit = np.arange(rows)[:, None], np.arange(inner // per_unit)
    return row % 8 * 16 * width + row // 8 * layout.stride + unit * (layout.leading if width == 1 else 16)


def matrices_in(units: Array, ptx_type: str, transposed: bool) -> Array:
    """Convert units as `unit_offsets` orders them to float64 `[n, rows, inner]`."""
    words = np.ascontiguousarray(units).view(np.uint32).reshape(*units.shape, 4)
    numbers = numbers_in_words(words, ptx_type).reshape(*units.shape, -1)
    if transposed:
        numbers = numbers.swapaxes(2, 3)
        return numbers.reshape(len(units), -1, units.shape[2])
    return numbers.reshape(len(units), units.shape[1], -1)

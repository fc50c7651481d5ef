"""Registers, spills, matrix instructions and load widths, read from compiled code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import triton

MATRIX_INSTRUCTION = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_|v_wmma_)")

# A load from global memory and its bytes a thread. PTX: `cp.async.cg.shared.global [..], [..], 0x10, ..` and
# `ld.global.v4.b32`; AMD: `buffer_load_dwordx4` and, since RDNA 3, `buffer_load_b128`.
_LOADS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], int]], ...] = (
    (re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\], (0x\w+|\d+)"), lambda load: int(load[1], 0)),
    (
        re.compile(r"ld\.global(?:\.[A-Za-z]\w*(?:::\w+)?)*?(?:\.v(\d))?\.[bufs](\d+)\s"),
        lambda load: int(load[1] or 1) * int(load[2]) // 8,
    ),
    (re.compile(r"(?:buffer|global)_load_dword(?:x(\d))?\s"), lambda load: 4 * int(load[1] or 1)),
    (re.compile(r"(?:buffer|global)_load_(?:d16_|hi_)*[biu](\d+)\s"), lambda load: int(load[1]) // 8),
    (re.compile(r"(?:buffer|global)_load_(?:[su]?short|short_d16)"), lambda load: 2),
    (re.compile(r"(?:buffer|global)_load_(?:[su]byte)"), lambda load: 1),
)


def matrix_instructions(asm: Mapping[str, Any]) -> int:
    """Count the matrix instructions of the code."""
    return len(MATRIX_INSTRUCTION.findall(_text(asm)))


def load_bytes(asm: Mapping[str, Any]) -> int:
    """Return the width in bytes of the loads that bring most of a thread's data, in the loop that loads most.

    Without a loop all loads count; 0 means that nothing is loaded.
    """
    text = _text(asm)
    moved = max((_moved(loop) for loop in _loops(text)), key=Counter.total, default=Counter()) or _moved(text)
    return max(moved, key=lambda size: (moved[size], size)) if moved else 0


def registers_and_spills(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that it spills to memory."""
    if "amdgcn" in asm:
        return _number(r"\.vgpr_count:\s+(\d+)", asm["amdgcn"]), 4 * (
            _number(r"\.vgpr_spill_count:\s+(\d+)", asm["amdgcn"])
        )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        used = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", used), _number(r"STACK:(\d+)", used) + _number(r"LOCAL:(\d+)", used)


def scalar_spills(asm: Mapping[str, Any]) -> int:
    """Return the scalar registers that AMD's code spills, to lanes of vector registers; NVIDIA's has none."""
    return _number(r"\.sgpr_spill_count:\s+(\d+)", asm["amdgcn"]) if "amdgcn" in asm else 0


def _text(asm: Mapping[str, Any]) -> str:
    return str(asm["ptx"] if "ptx" in asm else asm["amdgcn"])


def _loops(text: str) -> Iterator[str]:
    """Yield each piece of code from a label to the last branch back to it."""
    for label in re.finditer(r"^([$.\w]+):", text, re.M):
        rest = text[label.end() :]
        branches = list(re.finditer(rf"(?:bra\S*|s_cbranch\w+|s_branch)\s+{re.escape(label[1])}(?!\w)", rest))
        if branches:
            yield rest[: branches[-1].end()]


def _moved(text: str) -> Counter[int]:
    """Return the bytes loaded by loads of each width."""
    moved: Counter[int] = Counter()
    for pattern, width in _LOADS:
        for load in pattern.finditer(text):
            moved[width(load)] += width(load)
    return moved


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"nothing matches {pattern!r} in the compiler's report")
    return int(found[1])

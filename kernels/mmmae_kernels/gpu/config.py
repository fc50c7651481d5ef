"""What a launch is: kernel, grid, arguments, and the row of a launch table, by shape and architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

# Shared memory a block may have, bytes. NVIDIA: CUDA C++ Programming Guide, technical specifications by compute
# capability; AMD: LDS of a workgroup, in each architecture's ISA guide.
SHARED_MEMORY = {
    "sm80": 163 << 10,
    "sm86": 99 << 10,
    "sm89": 99 << 10,
    "sm90": 227 << 10,
    "sm100": 227 << 10,
    "sm120": 99 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
    "gfx1100": 64 << 10,
}

# Which row of a launch table an architecture reads: they differ in shared memory, in the matrix instruction and in the
# threads of a warp.
FAMILIES = {
    "sm80": "ampere",
    "sm86": "small",
    "sm89": "small",
    "sm120": "small",
    "sm90": "hopper",
    "sm100": "hopper",
    "gfx90a": "cdna",
    "gfx942": "cdna",
    "gfx1100": "rdna",
}


class Config(NamedTuple):
    """How a kernel is compiled: its block sizes and other constants, warps a program, stages of its pipelined loop.

    `registers` is what a thread may have on an NVIDIA GPU. Left to itself, the assembler spills a few into memory where
    that lets another block run beside.
    """

    constants: Mapping[str, int]
    warps: int = 4
    stages: int = 1
    registers: int | None = None

    def options(self, target: str) -> dict[str, int]:
        """What Triton's compiler takes for `target`."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None and target.startswith("sm"):
            options["maxnreg"] = self.registers
        return options


Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]


class Launch(NamedTuple):
    """One launch: the kernel, its grid as a function of the constants, its arguments by name, and its table's row.

    The configs stand with the best guess first.
    """

    kernel: Any
    grid: Grid
    arguments: Mapping[str, Any]
    configs: tuple[Config, ...]


# Given the architecture and the numbers of a launch, all of it but its tensors, which `launch` adds by their names.
Describe: TypeAlias = Callable[..., Launch]


def row_config(width: int, target: str) -> Config:
    """For kernels that hold a row in one program: 8 channels a thread, 16 bytes of a half type, up to 512 threads."""
    block = next_power_of_2(width)
    return element_config({"BLOCK_D": block}, block, target)


def element_config(constants: Mapping[str, int], elements: int, target: str) -> Config:
    """As many warps as give each thread 8 of a program's elements."""
    threads = 64 if family_of(target) == "cdna" else 32
    return Config(constants, warps=max(1, min(1024 // threads // 2, elements // (8 * threads))))


def strides(name: str, axes: str, values: tuple[int, ...] | None) -> dict[str, int]:
    """Strides as arguments `stride_{name}_{axis}`, one for each letter of `axes`; 0 for those of no tensor."""
    values = (0,) * len(axes) if values is None else values
    return {f"stride_{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number`, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def family_of(target: str) -> str:
    """The row of a launch table for an architecture; one that is unknown reads the row that asks least."""
    if target in FAMILIES:
        return FAMILIES[target]
    return "cdna" if target.startswith("gfx9") else "rdna" if target.startswith("gfx") else "small"

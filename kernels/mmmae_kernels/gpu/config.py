"""Description of a launch: kernel, grid, arguments, and configs by shape and architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

# Bytes of shared memory that a block may use. NVIDIA: CUDA C++ Programming Guide, technical specifications by compute
# capability; AMD: LDS of a workgroup, in the ISA guide of each architecture.
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

# Architectures with the same launch tables: families differ in shared memory, matrix instructions and warp size.
FAMILIES = {
    "sm80": "ampere",
    "sm86": "small",
    "sm87": "ampere",
    "sm89": "small",
    "sm120": "small",
    "sm90": "hopper",
    "sm100": "hopper",
    "gfx90a": "cdna",
    "gfx942": "cdna",
    "gfx1100": "rdna",
}


class Config(NamedTuple):
    """Compile options of a kernel.

    Args:
        constants: block sizes and other `tl.constexpr` arguments.
        warps: warps of a program.
        stages: stages of the pipelined loop.
        registers: register limit of a thread on NVIDIA GPUs; None leaves it to ptxas, which may spill a few registers
            so that another block fits on the multiprocessor.
    """

    constants: Mapping[str, int]
    warps: int = 4
    stages: int = 1
    registers: int | None = None

    def options(self, target: str) -> dict[str, int]:
        """Return the options in the names of Triton's compiler for `target`."""
        # Fused multiply-adds are Triton's default up to 3.9 only.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if self.registers is not None and target.startswith("sm"):
            options["maxnreg"] = self.registers
        return options


Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]


class Launch(NamedTuple):
    """A launch of a kernel.

    Args:
        kernel: the `triton.jit` function.
        grid: returns the grid, given the constants of a config.
        arguments: the kernel's arguments by name.
        configs: configs to choose from, the best guess first. A kernel that changes what it reads has only one, because
            autotuning runs a launch many times.
    """

    kernel: Any
    grid: Grid
    arguments: Mapping[str, Any]
    configs: tuple[Config, ...]


# Takes the architecture and the numbers of a launch, and returns the launch without its tensors, which `launch` adds.
Describe: TypeAlias = Callable[..., Launch]


def row_config(width: int, target: str) -> Config:
    """Return the config of a kernel whose programs hold a row: 8 channels a thread (16 bytes of a half dtype)."""
    block = next_power_of_2(width)
    return element_config({"BLOCK_D": block}, block, target)


def element_config(constants: Mapping[str, int], elements: int, target: str) -> Config:
    """Return a config with 8 elements a thread, up to 512 threads."""
    threads = 64 if family_of(target) == "cdna" else 32
    return Config(constants, warps=max(1, min(1024 // threads // 2, elements // (8 * threads))))


def strides(name: str, axes: str, values: tuple[int, ...] | None) -> dict[str, int]:
    """Return strides as arguments `stride_{name}_{axis}`, one for each letter of `axes`; None means zeros."""
    values = (0,) * len(axes) if values is None else values
    return {f"stride_{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least `number` and at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def family_of(target: str) -> str:
    """Return the family of an architecture; for an unknown one of NVIDIA, that of the next older one."""
    if target in FAMILIES:
        return FAMILIES[target]
    if target.startswith("gfx"):
        return "cdna" if target.startswith("gfx9") else "rdna"
    numbers = [int(known[2:]) for known in FAMILIES if known.startswith("sm")]
    older = [number for number in numbers if number < int(target[2:])]
    return FAMILIES[f"sm{max(older)}"] if older else "small"

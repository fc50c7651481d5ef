"""Executes the PTX that Triton compiles for NVIDIA GPUs, on the CPU, and finds what a GPU would not tell."""

from tests.emulator.ptx.errors import (
    Divergence,
    EmulatorError,
    Misaligned,
    OutOfBounds,
    Race,
    TooMuchSharedMemory,
    UnknownInstruction,
    UnsupportedKernel,
)
from tests.emulator.ptx.execution import Statistics, execute

__all__ = [
    "Divergence",
    "EmulatorError",
    "Misaligned",
    "OutOfBounds",
    "Race",
    "Statistics",
    "TooMuchSharedMemory",
    "UnknownInstruction",
    "UnsupportedKernel",
    "execute",
]

"""An emulator that executes the PTX of Triton kernels on the CPU and reports errors that a GPU would not."""

from tests.emulator.ptx.errors import (
    Deadlock,
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
    "Deadlock",
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

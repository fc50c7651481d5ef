"""How many programs of a kernel a GPU runs at the same time, by the registers and the shared memory that they take."""

from __future__ import annotations

from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """What a multiprocessor has for the programs that are resident on it, and how many of them the largest GPU has.

    On RDNA a multiprocessor is a work-group processor, which is two compute units: programs are given to it as a whole.

    Args:
        gpu: a GPU of the architecture.
        number: of multiprocessors of this GPU.
        schedulers: parts that a multiprocessor's warps are divided among, each with its own registers.
        warps: resident warps.
        programs: resident programs.
        registers: registers of all schedulers together, for a whole warp at a time: one for each of its threads.
        granule: a warp takes registers in multiples of this number.
        shared: bytes of shared memory.
        reserved: bytes of it that the system takes for each program.
    """

    gpu: str
    number: int
    schedulers: int
    warps: int
    programs: int
    registers: int
    granule: int
    shared: int
    reserved: int


# NVIDIA: CUDA C++ Programming Guide, technical specifications by compute capability, for warps, programs, registers
# (64 K for single threads: 2048 for a warp) and shared memory, of which the system reserves 1 KiB for a program. Four
# schedulers, and registers that a warp gets by 256 (eight a thread), as in the occupancy calculator of Nsight Compute.
# AMD: the ISA reference guides of MI200, MI300 and RDNA 3 for the waves of a SIMD (8, 8 and 16), its vector registers
# (512, 512 and 1536 for a wave), their granules, and the LDS; LLVM's user guide for AMDGPU for programs of several
# waves, which can wait at a barrier (16 a compute unit, 32 a work-group processor).
# Numbers of multiprocessors: NVIDIA's architecture white papers and AMD's data sheets; MI250X is two GPUs of 110.
MULTIPROCESSORS = {
    "sm80": Multiprocessor("A100", 108, 4, 64, 32, 2048, 8, 164 << 10, 1 << 10),
    "sm86": Multiprocessor("RTX 3090", 82, 4, 48, 16, 2048, 8, 100 << 10, 1 << 10),
    "sm89": Multiprocessor("RTX 4090", 128, 4, 48, 24, 2048, 8, 100 << 10, 1 << 10),
    "sm90": Multiprocessor("H100", 132, 4, 64, 32, 2048, 8, 228 << 10, 1 << 10),
    "sm100": Multiprocessor("B200", 148, 4, 64, 32, 2048, 8, 228 << 10, 1 << 10),
    "sm120": Multiprocessor("RTX 5090", 170, 4, 48, 24, 2048, 8, 100 << 10, 1 << 10),
    "gfx90a": Multiprocessor("half an MI250X", 110, 4, 32, 16, 2048, 8, 64 << 10, 0),
    "gfx942": Multiprocessor("MI300X", 304, 4, 32, 16, 2048, 8, 64 << 10, 0),
    "gfx1100": Multiprocessor("RX 7900 XTX", 48, 4, 64, 32, 6144, 24, 128 << 10, 0),
}


def resident_programs(target: str, registers: int, shared: int, warps: int) -> int:
    """Return how many programs a multiprocessor holds at the same time.

    Args:
        target: the architecture, for example `sm90`.
        registers: registers of a thread.
        shared: bytes of shared memory of a program.
        warps: warps of a program.
    """
    has = MULTIPROCESSORS[target]
    taken = max(1, -(-registers // has.granule)) * has.granule
    by_registers = has.registers // has.schedulers // taken * has.schedulers // warps
    limits = [has.warps // warps, by_registers]
    if warps > 1 or target.startswith("sm"):  # a program of one wave waits at no barrier
        limits.append(has.programs)
    if shared:
        limits.append(has.shared // (shared + has.reserved))
    return min(limits)


def occupancy(target: str, resident: int, warps: int) -> float:
    """Return which part of a multiprocessor's warps `resident` programs of `warps` warps are."""
    return resident * warps / MULTIPROCESSORS[target].warps


def waves(target: str, resident: int, programs: int) -> float:
    """Return the number of programs over those that the whole GPU holds at the same time.

    Below 1 a part of the GPU is idle. A little above a whole number, the last programs run while most of it is.
    """
    return programs / (MULTIPROCESSORS[target].number * resident)

"""Run the ops on the emulator, compiled as for a GPU, and break their kernels on purpose."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mmmae_kernels import use_backend
from mmmae_kernels.gpu.config import Config, Launch
from mmmae_kernels.gpu.executors import execute_by
from tests.emulator.ptx import execute
from tests.emulator.ptx.compilation import compile_kernel
from tests.emulator.repeated import Repeated

Mutation = Callable[[str], str]
_REPEATED = Repeated()


class Emulator:
    """An executor that runs launches on the emulator, as a GPU of the architecture `target` would.

    What a launch did to the same memory before, by the same code, is not executed again.

    Args:
        target: `sm80` for instance.
        choice: which config of a launch table's row runs, the last one where there are fewer.
        mutate: changes the code of the kernel `mutated` before it runs.
    """

    def __init__(self, target: str, choice: int = 0, mutated: str = "", mutate: Mutation | None = None) -> None:
        self.target, self.choice, self.mutated, self.mutate = target, choice, mutated, mutate
        self.most_configs = 1  # that a launch had to choose from

    def __call__(self, launch: Launch) -> Config:
        name = launch.kernel.fn.__name__
        self.most_configs = max(self.most_configs, len(launch.configs))
        config = launch.configs[min(self.choice, len(launch.configs) - 1)]
        grid = launch.grid(config.constants)
        arguments = {**launch.arguments, **config.constants}  # registers are the assembler's: the PTX has no number
        options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages}
        mutate = self.mutate if name == self.mutated else None

        def run() -> None:
            execute(launch.kernel, grid, arguments, target=self.target, mutate=mutate, **options)

        if mutate is None:
            ptx = compile_kernel(launch.kernel, arguments, self.target, options)[0].ptx
            _REPEATED.run(ptx, grid, {**arguments, **options}, run)
        else:
            run()
        return config


@contextlib.contextmanager
def emulated(emulator: Emulator) -> Iterator[Emulator]:
    """Run every op of the block on the emulator, and yield it; memory from torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        with execute_by(emulator), use_backend("triton"):
            yield emulator
    finally:
        torch.use_deterministic_algorithms(False)


def drop_barriers(ptx: str) -> str:
    """Remove the barriers at which the threads of a block wait for each other."""
    return re.sub(r"\bbar\.sync\s+\d+;", "", ptx)


def drop_masks(ptx: str) -> str:
    """Make all threads execute the loads and stores of global memory that were masked."""
    ptx = re.sub(r"@!?%p\d+ ((?:st|ld)\.global)", r"\1", ptx)
    # A masked asynchronous copy reads 0 bytes: here it reads as many as it writes.
    return re.sub(r"(cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], \w+), %r\d+;", r"\1;", ptx)


def shift_stores(ptx: str) -> str:
    """Move each store to global memory by 16 bytes."""
    return re.sub(r"(st\.global[^\[]*\[ %rd\d+ \+ )(\d+)( \])", lambda m: f"{m[1]}{int(m[2]) + 16}{m[3]}", ptx)


MUTATIONS: dict[str, Mutation] = {
    "barrier": drop_barriers,
    "mask": drop_masks,
    "offset": shift_stores,
}


def drop_swizzles(ptx: str) -> str:
    """Make the descriptors of matrices in shared memory, which begin as constants, say that nothing is swizzled."""
    constant = re.compile(r"\b\d{19}\b")
    return constant.sub(lambda found: str(int(found[0]) & (1 << 61) - 1), ptx)


def _drop(pattern: str) -> Mutation:
    """Return a mutation that removes all instructions that the pattern matches up to their operands."""
    return lambda ptx: re.sub(rf"(?:@!?%p\d+\s+)?{pattern}[^;]*;", "", ptx)


def wait_for_one_less(ptx: str) -> str:
    """Weaken each wait for products of a warpgroup by one group."""
    return re.sub(r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+)", lambda found: f"{found[1]}{int(found[2]) + 1}", ptx)


def wait_for_the_other_phase(ptx: str) -> str:
    """Turn the parity of each wait for an mbarrier."""
    wait = re.compile(r"(mbarrier\.try_wait\S*\s+\w+, \[[^\]]*\]), (%r\d+);")
    return wait.sub(r"{ .reg .b32 %other; xor.b32 %other, \2, 1; \1, %other; }", ptx)


def wait_for_nothing(ptx: str) -> str:
    """Take each phase of an mbarrier for complete."""
    return re.sub(r"mbarrier\.try_wait\S*\s+(\w+),[^;]*;", r"setp.eq.u32 \1, 0, 0;", ptx)


def expect_two_arrivals(ptx: str) -> str:
    """Make each mbarrier wait for one arrival more than there is."""
    return re.sub(r"(mbarrier\.init\S*\s+\[[^\]]*\], )1;", r"\g<1>2;", ptx)


# Of products that run asynchronously: on sm_90 of warpgroups, on sm_100 in tensor memory.
HOPPER: dict[str, Mutation] = {
    "swizzle": drop_swizzles,
    "proxy fence": _drop(r"fence\.proxy\.async"),
    "fence": _drop(r"wgmma\.fence"),
    "commit": _drop(r"wgmma\.commit_group"),
    "wait": _drop(r"wgmma\.wait_group"),
    "early wait": wait_for_one_less,
}
BLACKWELL: dict[str, Mutation] = {
    "swizzle": drop_swizzles,
    "proxy fence": _drop(r"fence\.proxy\.async"),
    "commit": _drop(r"tcgen05\.commit"),
    "wait": wait_for_nothing,
    "phase": wait_for_the_other_phase,
    "count": expect_two_arrivals,
    "wait for loads": _drop(r"tcgen05\.wait::ld"),
    "wait for stores": _drop(r"tcgen05\.wait::st"),
    "free": _drop(r"tcgen05\.dealloc"),
}

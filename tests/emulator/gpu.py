"""Run the ops on the emulator, compiled as for a GPU, and break their kernels on purpose."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import torch

from mmmae_kernels import use_backend
from mmmae_kernels.gpu.config import Config, Launch
from mmmae_kernels.gpu.executors import execute_by
from tests.emulator.ptx import execute

Mutation = Callable[[str], str]


class Emulator:
    """An executor that runs launches on the emulator, as a GPU of the architecture `target` would.

    Args:
        target: `sm80` for instance.
        choice: which config of a launch table's row runs, the last one where there are fewer.
        mutate: changes the code of the kernel `mutated` before it runs.
    """

    def __init__(self, target: str, choice: int = 0, mutated: str = "", mutate: Mutation | None = None) -> None:
        self.target, self.choice, self.mutated, self.mutate = target, choice, mutated, mutate

    def __call__(self, launch: Launch) -> Config:
        name = launch.kernel.fn.__name__
        config = launch.configs[min(self.choice, len(launch.configs) - 1)]
        execute(
            launch.kernel,
            launch.grid(config.constants),
            {**launch.arguments, **config.constants},  # registers are the assembler's: they do not change the PTX
            target=self.target,
            num_warps=config.warps,
            num_stages=config.stages,
            mutate=self.mutate if name == self.mutated else None,
        )
        return config


@contextlib.contextmanager
def emulated(emulator: Emulator) -> Iterator[None]:
    """Run every op of the block on the emulator; memory from torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        with execute_by(emulator), use_backend("triton"):
            yield
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

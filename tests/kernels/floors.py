"""The table of `docs/kernels.md` on what each kernel moves, and on how it fills a GPU: launches of `base`, compiled."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

import mmmae
from mmmae.cost.counting import count_step
from mmmae.cost.gpu import ATTENTION
from mmmae.cost.launches import Launches
from mmmae_kernels.aot.costs import cost
from mmmae_kernels.aot.rows import faults_of, row_of
from mmmae_kernels.gpu.config import SHARED_MEMORY, Launch
from mmmae_kernels.gpu.executors import execute_by
from mmmae_kernels.patch_embed.gpu import patch_embed_backward
from mmmae_kernels.random_masking.gpu import LONGEST_ROW, random_masking_forward

BATCHES = 8, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": None}  # of autocast
DETAILED = "sm90"
WITHOUT_FLASH = ("gfx1100",)  # where no flash kernel runs, whose results the vectors are merged into


class Largest:
    """An executor that runs nothing and keeps of each kernel the launch that moves most bytes."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.launches: dict[str, Launch] = {}

    def __call__(self, launch: Launch) -> Any:
        name = launch.kernel.fn.__name__.lstrip("_")
        if name not in self.launches or cost(launch)[1] > cost(self.launches[name])[1]:
            self.launches[name] = launch
        return launch.configs[0]


@functools.cache
def largest_launches(batch: int, dtype: str, target: str) -> dict[str, Launch]:
    """Return the largest launch of every kernel in training steps of `base`, and of kernels that these do not need."""
    largest, autocast = Largest(target), DTYPES[dtype]
    attention = "sdpa" if autocast is None or target in WITHOUT_FLASH else ATTENTION
    receive = Launches.receive

    def keep(launches: Launches, launch: Launch) -> None:
        largest(launch)
        receive(launches, launch)

    config = mmmae.MMMAEConfig.preset("base")
    with mock.patch.object(Launches, "receive", keep):
        for goal in ("embedding", "pixels"):
            with torch.device("meta"):
                model = mmmae.FastModel(mmmae.MMMAEConfig.preset("base", target=goal), "triton", attention)
            count_step(model, batch, autocast=autocast, target=target)
    weight = torch.empty(config.dim, config.in_channels, *config.patch, dtype=autocast)
    ids = torch.arange(config.keep).expand(batch, -1)
    volume = torch.empty(batch, config.in_channels, config.bands, config.image_size, config.image_size)
    needs = (True, False, False, False)
    with execute_by(largest):
        patch_embed_backward(torch.empty(batch, config.keep, config.dim), volume, weight, ids, needs)
        random_masking_forward(batch, LONGEST_ROW + 1, 1, torch.tensor(0), torch.device("cpu"), 0)
    return largest.launches


@functools.cache
def rows_of(kernel: str, dtype: str, target: str) -> list[dict[str, Any]]:
    """Return what the kernel's largest launch needs at each of `BATCHES`; empty if it isn't launched."""
    rows = []
    for batch in BATCHES:
        launch = largest_launches(batch, dtype, target).get(kernel)
        if launch is not None:
            rows.append({"dtype": dtype, **row_of(launch, launch.configs[0], target), "note": "of another table"})
            faults = faults_of(rows[-1])
            assert not faults, faults
    return rows


def floors() -> str:
    """Return the tables: one in detail for each dtype on one architecture, and one for all architectures."""
    text = ""
    for dtype in DTYPES:
        text += f"| {DETAILED}, {dtype} | MB | programs | waves | registers | KiB | occupancy |\n"
        text += f"| --- |{' ---: |' * 6}\n"
        text += "".join(map("{}\n".format, filter(None, (detailed(kernel, dtype) for kernel in kernels()))))
        text += "\n"
    text += f"| bf16 | {' | '.join(SHARED_MEMORY)} |\n| --- |{' ---: |' * len(SHARED_MEMORY)}\n"
    for kernel in kernels():
        cells = (compact(rows_of(kernel, "bf16", target)) for target in SHARED_MEMORY)
        text += f"| {kernel} | {' | '.join(cells)} |\n"
    return text


def kernels() -> list[str]:
    """Return the names of all kernels, those with most bytes first."""
    launches = largest_launches(BATCHES[0], "bf16", DETAILED)
    return sorted(launches, key=lambda kernel: -cost(launches[kernel])[1])


def detailed(kernel: str, dtype: str) -> str:
    """Return the line of a kernel on one architecture; empty if it isn't launched."""
    rows = rows_of(kernel, dtype, DETAILED)
    if not rows:
        return ""
    cells = launched(kernel, dtype)
    cells.append(both([number(row["waves"]) for row in rows]))
    cells.append(both([str(row["registers"]) for row in rows]))
    cells.append(both([f"{row['shared'] / 1024:.1f}".removesuffix(".0") for row in rows]))
    cells.append(both([percent(row) for row in rows]))
    return f"| {kernel} | {' | '.join(cells)} |"


def launched(kernel: str, dtype: str) -> list[str]:
    """Return the cells that need no compiler: megabytes and programs."""
    launches = [largest_launches(batch, dtype, DETAILED)[kernel] for batch in BATCHES]
    programs = [functools.reduce(int.__mul__, launch.grid(launch.configs[0].constants)) for launch in launches]
    return [both([number(cost(launch)[1] / 1e6) for launch in launches]), both([f"{count:,}" for count in programs])]


def compact(rows: Sequence[dict[str, Any]]) -> str:
    """Return occupancy and waves in one cell, empty without rows."""
    if not rows:
        return ""
    return f"{both([percent(row) for row in rows])} · {both([number(row['waves']) for row in rows])}"


def both(cells: Sequence[str]) -> str:
    """Return what holds for the two batch sizes, once if it is the same."""
    return " / ".join(dict.fromkeys(cells))


def number(value: float) -> str:
    """Return a number with about two digits."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def percent(row: dict[str, Any]) -> str:
    """Return the occupancy."""
    return f"{100 * row['occupancy']:.0f} %"

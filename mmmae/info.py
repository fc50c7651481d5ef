"""What this machine offers: versions, devices, and the implementations of each op with their reasons."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

import mmmae_kernels

PACKAGES = ("mmmae", "torch", "triton", "lightning", "flash-attn", "xformers", "fvcore", "numpy", "rasterio")
VARIABLES = ("MMMAE_KERNELS", "MMMAE_ATTENTION", "MMMAE_NATIVE", "MMMAE_AUTOTUNE", "MMMAE_TUNE_CPU", "MMMAE_DEBUG")


def print_info(console: Console | None = None) -> None:
    """Print three tables: versions and devices, variables that are set, and which implementation serves each op."""
    console = console or Console()
    machine = Table(title="machine", show_header=False, title_justify="left")
    machine.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        machine.add_row(package, version(package))
    machine.add_row("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        capability = f"{properties.major}.{properties.minor}"
        memory = properties.total_memory / 2**30
        machine.add_row(f"cuda:{number}", f"{properties.name}, capability {capability}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        machine.add_row("gpu", "none that torch sees")
    for variable in VARIABLES:
        if variable in os.environ:
            machine.add_row(variable, os.environ[variable])
    console.print(machine)

    ops = Table(title="implementations, the preferred first", title_justify="left")
    for heading in ("op", "implementation", "on this machine"):
        ops.add_column(heading)
    for op, answers in sorted(mmmae_kernels.explain().items()):
        for row, (implementation, answer) in enumerate(answers.items()):
            ops.add_row(op if row == 0 else "", implementation, answer, end_section=row == len(answers) - 1)
    console.print(ops)


def version(package: str) -> str:
    """The installed version of a package, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

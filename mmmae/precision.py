"""The precision to compute in on a device, and TF32 for products that stay in float32."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

from mmmae_kernels.gpu import architecture

from .checks import check_choice
from .files import write_json

Precision: TypeAlias = Literal["auto", "32", "bf16", "16"]

CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = ("avx512_bf16", "amx_bf16")  # of CPUs that multiply bfloat16 faster than float32
ROWS = 196  # of the measured product: the visible tokens of a sample
WIDTH = 768  # of `base` and `vit`
SECONDS = 0.02  # for the measurement of a type
GAIN = 1.25  # bfloat16 pays where a layer is so many times as fast


def best_precision(device: torch.device, width: int = WIDTH) -> Literal["32", "bf16"]:
    """Return the precision that `auto` stands for: `bf16` on devices where it makes training faster, `32` elsewhere.

    These are GPUs with matrix units for bfloat16 (NVIDIA's from compute capability 8.0 on, and AMD's that the Triton
    kernels are compiled for), and CPUs with instructions for it on which a linear layer of this width is at least
    1.25 times as fast in bfloat16. That is measured once, see `measured_speeds`. The environment variable
    MMMAE_PRECISION, `32` or `bf16`, answers instead.

    Args:
        device: the device to compute on.
        width: width of the model; narrow layers gain less.
    """
    chosen = os.environ.get("MMMAE_PRECISION")
    if chosen:
        check_choice("MMMAE_PRECISION", chosen, ("32", "bf16"))
        return "bf16" if chosen == "bf16" else "32"
    if device.type == "cpu":
        return "bf16" if has_bf16_instructions() and measured_speeds(width).gain >= GAIN else "32"
    return "bf16" if _has_matrix_units(device) else "32"


def resolve_precision(precision: Precision, device: torch.device, width: int = WIDTH) -> Literal["32", "bf16", "16"]:
    """Return a precision, with what `best_precision` says in place of `auto`."""
    return best_precision(device, width) if precision == "auto" else precision


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the context in which a forward pass computes in `precision`: autocast, or nothing for `32`."""
    if precision == "32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


class Speeds(NamedTuple):
    """Milliseconds of a linear layer in float32, and in bfloat16 with the cast of its float32 input."""

    float32: float
    bfloat16: float

    @property
    def gain(self) -> float:
        """How many times as fast the layer is in bfloat16."""
        return self.float32 / self.bfloat16


def has_bf16_instructions() -> bool:
    """Return whether this CPU has AVX512-BF16 or AMX-BF16."""
    flags = re.search(r"^flags\s*: (.*)", _cpuinfo(), re.MULTILINE)
    return flags is not None and not set(CPU_FLAGS).isdisjoint(flags[1].split())


def measured_speeds(width: int = WIDTH) -> Speeds:
    """Return the speeds of a linear layer of this width on this CPU, from the file of an earlier measurement or anew.

    A measurement takes some 50 ms. There is a file for each CPU, version of torch, and width, in `folder()`.
    """
    return _measured_speeds(f"{_cpu_name()}, torch {torch.__version__}", width)


@functools.cache
def _measured_speeds(machine: str, width: int) -> Speeds:
    file = folder() / f"{hashlib.sha256(f'{machine}, width {width}'.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(file.read_text())
        return Speeds(float(stored["float32_ms"]), float(stored["bfloat16_ms"]))
    speeds = measure_speeds(width)
    with contextlib.suppress(OSError):  # without a home that can be written, each process measures
        file.parent.mkdir(parents=True, exist_ok=True)
        found = {"float32_ms": speeds.float32, "bfloat16_ms": speeds.bfloat16}
        write_json(file, {"machine": machine, "width": width, **found})
    return speeds


def folder() -> Path:
    """Return the folder of the results: `precision` in `$XDG_CACHE_HOME/mmmae`, or in `~/.cache/mmmae`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmmae" / "precision"


@torch.inference_mode()
def measure_speeds(width: int) -> Speeds:
    """Time a linear layer of this width on one thread in both types, in turn; return the shortest times.

    On one thread, because several have to wait for each other where other processes keep the cores busy.
    """
    x, weight = torch.ones(ROWS, width), torch.ones(width, width)  # not random: seeds must not see the measurement
    half = weight.to(torch.bfloat16)
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while len(times[torch.float32]) < 5 or max(map(sum, times.values())) < SECONDS:
            for factor in (weight, half):
                start = time.perf_counter()
                F.linear(x.to(factor.dtype), factor)
                times[factor.dtype].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return Speeds(*(1e3 * min(taken[1:]) for taken in times.values()))  # the first call prepares


def use_tf32(device: torch.device) -> bool:
    """Let the matrix units of an NVIDIA GPU multiply float32 matrices, with factors rounded to TF32.

    TF32 has the range of float32 and the 10 bits of float16; products are summed in float32. The GPU multiplies about
    eight times as fast as with exact factors. This is the setting `torch.set_float32_matmul_precision("high")` of the
    whole process; the kernels of this package follow it too.

    Returns:
        Whether the setting was made: False with MMMAE_TF32=0, and on devices without such units.
    """
    if not _has_tf32(device) or _is_exact():
        return False
    torch.set_float32_matmul_precision("high")
    return True


def describe_precision(device: torch.device) -> str:
    """Return in words what `auto` is on a device and why, and how float32 matrices are multiplied there."""
    automatic = f"precision auto is {best_precision(device)}"
    if os.environ.get("MMMAE_PRECISION"):
        automatic += " by MMMAE_PRECISION"
    elif device.type == "cpu":
        automatic += f": {_reason_on_cpu()}"
    if not _has_tf32(device):
        return automatic
    return f"{automatic}; precision 32 multiplies " + ("exactly" if _is_exact() else "in TF32")


def _reason_on_cpu() -> str:
    if not has_bf16_instructions():
        return "this CPU has no instructions for bfloat16"
    speeds = measured_speeds()
    return (
        f"a layer of width {WIDTH} is {speeds.gain:.1f} times as fast in bfloat16 as in float32 "
        f"({GAIN} times is enough; measured once, {folder()})"
    )


def _cpuinfo() -> str:
    return CPUINFO.read_text() if CPUINFO.exists() else ""


def _cpu_name() -> str:
    name = re.search(r"^model name\s*: (.*)", _cpuinfo(), re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def _is_exact() -> bool:
    return os.environ.get("MMMAE_TF32") == "0"


def _has_matrix_units(device: torch.device) -> bool:
    return device.type == "cuda" and architecture.refuses(architecture.target_of(device)) is None


def _has_tf32(device: torch.device) -> bool:
    return _has_matrix_units(device) and torch.version.hip is None

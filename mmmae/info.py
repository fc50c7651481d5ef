"""Versions, devices and implementations of each op on this machine, and the attention backends of other machines."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

import mmmae_kernels
from mmmae_kernels import dispatch
from mmmae_kernels.attention.backends.sdpa import kernel_for
from mmmae_kernels.attention.call import Call, target_of
from mmmae_kernels.attention.op import BACKENDS, explain_call
from mmmae_kernels.gpu import architecture
from mmmae_kernels.gpu.config import family_of

from .precision import describe_precision

PACKAGES = (
    *("mmmae", "torch", "triton", "lightning"),
    *("flash-attn-4", "flash-attn-3", "flash-attn", "xformers"),
    *("fvcore", "numpy", "rasterio"),
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
NEEDED = {"triton": f", {'.'.join(map(str, dispatch.OLDEST_TRITON))} or newer is needed for GPU kernels"}
HEAD_WIDTH = 64  # of the presets
VARIABLES = (
    *("MMMAE_KERNELS", "MMMAE_ATTENTION", "MMMAE_NATIVE", "MMMAE_AUTOTUNE"),
    *("MMMAE_PRECISION", "MMMAE_TF32", "MMMAE_TUNE_CPU", "MMMAE_DEBUG"),
)


def print_info(console: Console | None = None) -> None:
    """Print versions, devices and environment variables, and which implementation serves each op on this machine."""
    console = console or Console()
    machine = Table(title="machine", show_header=False, title_justify="left")
    machine.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        machine.add_row(package, version(package) + NEEDED.get(package, ""))
    machine.add_row("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    machine.add_row("", describe_precision(torch.device("cpu")))
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        capability = f"{properties.major}.{properties.minor}"
        memory = properties.total_memory / 2**30
        machine.add_row(f"cuda:{number}", f"{properties.name}, capability {capability}, {memory:.0f} GiB")
        machine.add_row("", kernels_on(architecture.target_of(torch.device("cuda", number))))
        machine.add_row("", describe_precision(torch.device("cuda", number)))
    if torch.cuda.is_available():
        machine.add_row("autotuning", autotuning())
    else:
        machine.add_row("gpu", "none visible to torch")
    for variable in VARIABLES:
        if variable in os.environ:
            machine.add_row(variable, os.environ[variable])
    console.print(machine)

    ops = Table(title="implementations, in order of preference", title_justify="left")
    for heading in ("op", "implementation", "on this machine"):
        ops.add_column(heading)
    for op, answers in sorted(mmmae_kernels.explain().items()):
        if op in ("attention", "concat_attention"):
            continue
        for row, (implementation, answer) in enumerate(answers.items()):
            ops.add_row(op if row == 0 else "", implementation, answer, end_section=row == len(answers) - 1)
    console.print(ops)
    target = target_of("cuda" if torch.cuda.is_available() else "cpu", None)
    calls = [Call(target, dtype, HEAD_WIDTH) for dtype in (torch.float32, torch.bfloat16)]
    _print_attention(console, "attention on this machine", calls, here=True)


def print_info_for(calls: Sequence[Call], console: Console | None = None) -> None:
    """Print which attention backend would be chosen on other machines, and why the others would not."""
    for call in calls:
        title = f"attention on {_spelled(call.target)}, with every package installed"
        _print_attention(console or Console(), title, [call], here=False)
        if call.target != "cpu":
            (console or Console()).print(
                f"other ops on {_spelled(call.target)}: {kernels_on(call.target)}", highlight=False
            )


def kernels_on(target: str) -> str:
    """Return whether Triton kernels run on a GPU of an architecture, and by which rows of the launch tables."""
    needs = architecture.refuses(target)
    return f"PyTorch's code, because {needs}" if needs else f"Triton kernels, launch tables of {family_of(target)}"


def autotuning() -> str:
    """Return whether launches are tuned, and where the results are."""
    if importlib.util.find_spec("triton") is None:
        return "off: triton is not installed"
    from mmmae_kernels.gpu import autotune  # imports triton

    if not autotune.is_on():
        return "off: launches use the first config of their tables; MMMAE_AUTOTUNE=1 measures all"
    return f"on: {len(list(autotune.folder().glob('*.json')))} results in {autotune.folder()}"


def parse_call(text: str) -> Call:
    """Parse `TARGET:DTYPE` or `TARGET:DTYPE:HEAD_WIDTH`, such as `sm_90:bf16`, `gfx942:fp16:80` or `cpu:fp32`."""
    expected = "expected TARGET:DTYPE or TARGET:DTYPE:HEAD_WIDTH, such as sm_90:bf16 or gfx942:fp16:80"
    parts = text.split(":")
    if len(parts) not in (2, 3):
        raise ValueError(f"--for is {text!r}, {expected}")
    target = parts[0].lower().replace("sm_", "sm")
    if not re.fullmatch(r"cpu|sm\d{2,3}|gfx[0-9a-f]{3,4}", target):
        raise ValueError(f"--for has the target {parts[0]!r}, expected cpu, sm_80, gfx942 or another of this form")
    if parts[1] not in DTYPES:
        raise ValueError(f"--for has the type {parts[1]!r}, must be one of {', '.join(DTYPES)}")
    if len(parts) == 3 and not re.fullmatch(r"[1-9]\d*", parts[2]):
        raise ValueError(f"--for has the head width {parts[2]!r}, expected a whole number >= 1")
    return Call(target, DTYPES[parts[1]], int(parts[2]) if len(parts) == 3 else HEAD_WIDTH)


def _print_attention(console: Console, title: str, calls: Sequence[Call], *, here: bool) -> None:
    """Print a table of the attention backends with a column for each call."""
    table = Table(title=title, title_justify="left")
    table.add_column("backend")
    names = {dtype: name for name, dtype in DTYPES.items()}
    for call in calls:
        table.add_column(f"{names[call.dtype]}, head width {call.head_width}")
    columns = [_answers(call, here=here) for call in calls]
    for backend in BACKENDS:
        table.add_row(backend, *(column[backend] for column in columns))
    console.print(table)
    for call in calls:
        reasons = explain_call(call._replace(masked=True), here=here)
        console.print(f"{names[call.dtype]} with key_present: {_first(reasons)}", highlight=False)


def _answers(call: Call, *, here: bool) -> dict[str, str]:
    """Return for each backend that it is chosen, that another comes first, or why it does not serve the call."""
    reasons = explain_call(call, here=here)
    chosen = _first(reasons)
    answers = {name: reason or f"serves, but {chosen} comes first" for name, reason in reasons.items()}
    answers[chosen] = "chosen"
    return {**answers, "sdpa": f"{answers['sdpa']}; {kernel_for(call)}"}


def _first(reasons: Mapping[str, str | None]) -> str:
    return next(name for name, reason in reasons.items() if reason is None)


def _spelled(target: str) -> str:
    return target.replace("sm", "sm_")


def version(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

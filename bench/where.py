"""Profile a training step by operator: `python bench/where.py vit 4` for a preset and a batch, on the CPU.

The model gets no auxiliary images, and the step is forward and backward, with `--dtype bfloat16` under autocast. Times
are the profiler's, each operator without those it calls; the time of a step without the profiler is printed too.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function, schedule

import mmmae
from mmmae.precision import autocast
from mmmae_kernels.operators import kernels_for

DTYPES = {"float32": "32", "bfloat16": "bf16"}
# Kernels that run within the node of a block, where the profiler does not see them by themselves.
KERNELS = (
    *("add_layer_norm_forward", "add_layer_norm_backward", "gelu_forward", "gelu_backward"),
    *("attention_forward", "attention_backward"),
)
GEMMS = ("aten::addmm", "aten::bmm", "aten::mm", "mkldnn::_linear_pointwise")
SETTLING, PROFILED, TIMED = 3, 2, 5  # steps


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="vit")
    parser.add_argument("batch", nargs="?", type=int, default=4)
    parser.add_argument(
        "--model",
        choices=("fast", "sdpa", "eager"),
        default="fast",
        help="the fast model, or the reference with this attention",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the products; default: float32")
    options = parser.parse_args()
    mmmae.tune_cpu()
    torch.manual_seed(0)
    config = mmmae.MMMAEConfig.preset(options.preset, aux={})
    model = (
        mmmae.fast_model(config) if options.model == "fast" else mmmae.reference_model(config, attention=options.model)
    )
    hsi = torch.randn(options.batch, config.in_channels, config.bands, config.image_size, config.image_size)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(DTYPES[options.dtype], hsi.device):
            loss = model(hsi, seed=0).loss
        loss.backward()

    for _ in range(2):
        step()
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    name_kernels()
    # The profiler allocates too, among the step's own tensors, until the heap has room for both.
    settle = schedule(wait=0, warmup=SETTLING, active=PROFILED)
    with profile(activities=[ProfilerActivity.CPU], schedule=settle) as profiler:
        for number in range(SETTLING + PROFILED):
            if number > 0:
                profiler.step()
            step()
    events = [event for event in profiler.key_averages() if not event.key.startswith("ProfilerStep")]
    total = sum(event.self_cpu_time_total for event in events)
    kinds: defaultdict[str, float] = defaultdict(float)
    for event in events:
        kinds[kind_of(event.key)] += event.self_cpu_time_total / total
    work = f"{options.model} {options.preset}, batch {options.batch}, {options.dtype}"
    table = Table(title=f"{work}, {torch.get_num_threads()} threads")
    for heading in ("what", "calls a step", "ms a step", "share"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for kind in ("GEMM", "attention", "rest"):
        table.add_row(kind, "", f"{kinds[kind] * total / PROFILED / 1e3:.1f}", f"{kinds[kind]:.1%}", style="bold")
    table.add_section()
    rest = sorted((e for e in events if kind_of(e.key) == "rest"), key=lambda e: -e.self_cpu_time_total)
    for event in rest[:16]:
        milliseconds, share = event.self_cpu_time_total / PROFILED / 1e3, event.self_cpu_time_total / total
        table.add_row(event.key[:50], f"{event.count / PROFILED:g}", f"{milliseconds:.1f}", f"{share:.2%}")
    others = rest[16:]
    share = sum(event.self_cpu_time_total for event in others) / total
    table.add_row(f"{len(others)} others", "", f"{share * total / PROFILED / 1e3:.1f}", f"{share:.2%}")
    Console().print(table)
    print(f"a step without the profiler: {statistics.median(seconds):.3f} s, median of {TIMED}")


def name_kernels() -> None:
    """Show the native kernels of blocks to the profiler, under their names."""
    kernels = kernels_for(torch.empty(0), "native")
    for name in KERNELS:
        setattr(kernels, name, _named(f"mmmae::{name}", getattr(kernels, name)))


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with record_function(name):
            return function(*arguments)

    return run


def kind_of(name: str) -> str:
    """Return whether an operator is a GEMM, attention or rest; ours go by the name of their autograd node."""
    if name in GEMMS:
        return "GEMM"
    is_attention = "scaled_dot_product" in name or name.startswith(
        ("mmmae::attention", "GeneratedBackwardFor_mmmae_att")
    )
    return "attention" if is_attention else "rest"


if __name__ == "__main__":
    main()

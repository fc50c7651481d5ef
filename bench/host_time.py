"""Host time of a training step, which Python and dispatch take beside arithmetic: `python -m bench.host_time`.

Sizes are so small that arithmetic takes next to nothing. Triton's launches go through its real launcher, over a driver
that launches nothing (`tests/emulator/stub_driver`); attention's native kernel is left out. Times are process time, the
best of interleaved rounds, as ratios to the reference with SDPA, or for single ops to the same in plain PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import importlib
import json
import pstats
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import mmmae
import mmmae_kernels
from mmmae_kernels import use_backend
from mmmae_kernels.gpu.executors import StandInGpu, execute_by
from tests.emulator.stub_driver import install

TARGET = "sm90"
SETTLING, SWEEPS, ROUNDS = 3, 6, 6
SIZES: dict[str, Any] = {"image_size": 32, "dim": 32, "heads": 2, "decoder_dim": 32, "decoder_heads": 2}
SIZES |= {"aux_dim": 32, "aux_patch": 16}


class Seconds(NamedTuple):
    """Process time of one pass forward and backward."""

    forward: float
    backward: float


class Host(NamedTuple):
    """The seconds of each contender, the first of which is the baseline: best forward, best backward, best of both."""

    case: str
    contenders: dict[str, tuple[float, float, float]]

    def ratios(self) -> dict[str, tuple[float, float, float]]:
        """Return the seconds of each contender over those of the first."""
        forward, backward, both = next(iter(self.contenders.values()))
        return {name: (f / forward, b / backward, t / both) for name, (f, b, t) in self.contenders.items()}

    def best_of(self, other: Host) -> Host:
        """Return the best of two measurements of this case."""
        pairs = {name: zip(best, other.contenders[name], strict=True) for name, best in self.contenders.items()}
        return Host(self.case, {name: (min(f), min(b), min(t)) for name, (f, b, t) in pairs.items()})


Pass = Callable[[], Seconds]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print seconds instead of ratios in tables")
    parser.add_argument(
        "--where", choices=("reference", "native", "triton"), help="print where a model's step spends host time"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what no kernel has written may be such numbers, which take far longer
    torch.manual_seed(0)
    install(TARGET)
    with without_arithmetic():
        if options.where:
            Console().print(where(options.where))
            return
        found = measure({"step, no images": models(False), "step, three images": models(True), **ops()})
    if options.json:
        print(json.dumps(found))
    else:
        Console().print(table(found))


def measure(cases: dict[str, dict[str, Pass]]) -> list[Host]:
    """Time the passes of each case in interleaved rounds and keep the best of each.

    Other work on the machine only adds time, but for seconds at a stretch: so the rounds of a case are spread over the
    whole run, in several sweeps over all cases.
    """
    for run in [run for passes in cases.values() for run in passes.values()]:
        for _ in range(SETTLING):
            run()
    taken: dict[str, dict[str, list[Seconds]]] = {case: {name: [] for name in cases[case]} for case in cases}
    for case in [*cases] * SWEEPS:
        gc.collect()
        gc.disable()
        try:
            for _ in range(ROUNDS):
                for name, run in cases[case].items():
                    taken[case][name].append(run())
        finally:
            gc.enable()
    return [Host(case, {name: best(seconds) for name, seconds in passes.items()}) for case, passes in taken.items()]


def best(seconds: Sequence[Seconds]) -> tuple[float, float, float]:
    """Return the least time of a forward pass, of a backward pass, and of both together."""
    return min(s.forward for s in seconds), min(s.backward for s in seconds), min(map(sum, seconds))


def models(aux: bool) -> dict[str, Pass]:
    """Return a training step of the reference with SDPA, and of the fast model with native and with Triton kernels."""
    config = mmmae.MMMAEConfig.preset("base", **SIZES, **({} if aux else {"aux": {}}))
    reference = mmmae.reference_model(config, attention="sdpa")
    hsi = torch.randn(1, config.in_channels, config.bands, config.image_size, config.image_size)
    images = {name: torch.randn(1, channels, *hsi.shape[-2:]) for name, channels in config.aux.items()}

    def step(model: torch.nn.Module) -> Pass:
        def run() -> Seconds:
            model.zero_grad(set_to_none=True)
            start = time.process_time()
            loss = model(hsi, images).loss
            middle = time.process_time()
            loss.backward()
            return Seconds(middle - start, time.process_time() - middle)

        return run

    return {
        "reference": step(reference),
        "native": step(mmmae.fast_model(reference, kernels="native", attention="native")),
        "triton": on_gpu(step(mmmae.fast_model(reference, kernels="triton", attention="native"))),
    }


def ops() -> dict[str, dict[str, Pass]]:
    """Return passes of single ops and of what a user would write otherwise, many calls each."""
    x, residual = torch.randn(1, 8, 32, requires_grad=True), torch.randn(1, 8, 32, requires_grad=True)
    weight, bias = torch.randn(32, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    scale, shift = torch.randn(32, requires_grad=True), torch.randn(32, requires_grad=True)
    volume, ids = torch.randn(1, 1, 3, 32, 32), torch.tensor([[0, 3]])
    kernel, position = torch.randn(32, 1, 3, 16, 16, requires_grad=True), torch.randn(4, 32, requires_grad=True)
    packed = torch.randn(1, 8, 3, 2, 16, requires_grad=True)

    def eager_norm() -> tuple[Tensor, Tensor]:
        total = x + residual + bias
        return total, F.layer_norm(total, (32,), scale, shift, 1e-6)

    def eager_patch_embed() -> Tensor:
        tokens = F.conv3d(volume, kernel, bias, stride=(3, 16, 16)).flatten(2).transpose(1, 2) + position
        return tokens.gather(1, ids[:, :, None].expand(-1, -1, 32))

    def eager_attention() -> Tensor:
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def eager_norm_linear() -> tuple[Tensor, Tensor]:
        total, norm = eager_norm()
        return total, F.linear(norm, weight, bias)

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "add_layer_norm": (
            eager_norm,
            lambda: mmmae_kernels.add_layer_norm(x, residual, scale, shift, 1e-6, bias),
        ),
        "norm_linear": (
            eager_norm_linear,
            lambda: mmmae_kernels.norm_linear(x, residual, scale, shift, weight, bias, 1e-6, bias),
        ),
        "gelu_linear": (
            lambda: F.linear(F.gelu(x + shift), weight, bias),
            lambda: mmmae_kernels.gelu_linear(x, weight, bias, shift),
        ),
        "patch_embed": (
            eager_patch_embed,
            lambda: mmmae_kernels.patch_embed(volume, kernel, bias, ids, position),
        ),
        "attention": (eager_attention, lambda: mmmae_kernels.attention(packed, backend="native")),
    }
    leaves = (x, residual, weight, bias, scale, shift, kernel, position, packed)
    return {
        op: {"eager": calls(eager, leaves), "native": with_kernels("native", calls(ours, leaves))}
        | ({} if op == "attention" else {"triton": on_gpu(with_kernels("triton", calls(ours, leaves)))})
        for op, (eager, ours) in pairs.items()
    }


def calls(function: Callable[[], Any], leaves: Sequence[Tensor], times: int = 50) -> Pass:
    """Return a pass that calls a function of leaves some times and gives the mean."""

    def run() -> Seconds:
        forward = backward = 0.0
        for _ in range(times):
            start = time.process_time()
            outputs = function()
            forward += time.process_time() - start
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            incoming = [torch.ones_like(output) for output in outputs]
            start = time.process_time()
            torch.autograd.backward(outputs, incoming)
            backward += time.process_time() - start
            for leaf in leaves:
                leaf.grad = None
        return Seconds(forward / times, backward / times)

    return run


def with_kernels(backend: str, run: Pass) -> Pass:
    """Return the pass with a backend of the ops."""

    def served() -> Seconds:
        with use_backend(backend):
            return run()

    return served


def on_gpu(run: Pass) -> Pass:
    """Return the pass as if its tensors lay on a GPU."""
    gpu = StandInGpu(TARGET)

    def executed() -> Seconds:
        with execute_by(gpu):
            return run()

    return executed


@contextlib.contextmanager
def without_arithmetic() -> Iterator[None]:
    """Leave out what a GPU's host does not do, in the whole process: arithmetic, and reading token numbers."""
    native = importlib.import_module("mmmae_kernels.attention.backends.native")
    checks = importlib.import_module("mmmae_kernels.checks")
    masking = importlib.import_module("mmmae_kernels.random_masking.gpu")
    draw = masking.random_masking_forward

    def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, queries, heads, _ = q.shape
        return torch.empty(q.shape), torch.empty(batch, heads, queries)

    def tables(batch: int, tokens: int, keep: int, *rest: Any) -> tuple[Tensor, ...]:
        """Fill in the token numbers that the kernel has not written."""
        made: tuple[Tensor, ...] = draw(batch, tokens, keep, *rest)
        for table, start in zip(made, (0, keep, 0), strict=True):
            torch.arange(start, start + table.shape[1], out=table[0])
        return made

    linear = importlib.import_module("mmmae_kernels.linear")
    vars(linear)["ONEDNN_IS_FASTER"] = False  # a choice that only a CPU makes
    replaced = {
        native.attention_forward: attention_forward,
        native.attention_backward: lambda *_: None,
        checks.check_ids: lambda *_: None,
        draw: tables,
    }
    for module in [module for name, module in sys.modules.items() if name.startswith("mmmae")]:
        for name, value in list(vars(module).items()):
            with contextlib.suppress(TypeError):  # what has no hash
                if value in replaced:
                    setattr(module, name, replaced[value])
    yield


def where(contender: str, steps: int = 50) -> Table:
    """Return the time of each file's functions, and of the C functions that they call, forward and backward."""
    made = Table(title=f"{contender}, three images: ms a step, profiled (which adds to Python's share)")
    for heading in ("where", "forward", "backward"):
        made.add_column(heading, justify="left" if heading == "where" else "right")
    found: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for place, profile in enumerate(profiled(contender, steps)):
        for name, seconds in own_time(profile).items():
            found[name][place] += seconds / steps * 1e3
    for name, row in sorted(found.items(), key=lambda item: -sum(item[1])):
        if sum(row) >= 0.002 * sum(map(sum, found.values())):
            made.add_row(name, *(f"{value:.3f}" for value in row))
    made.add_section()
    made.add_row("all", *(f"{sum(row[place] for row in found.values()):.3f}" for place in range(2)))
    return made


def profiled(contender: str, steps: int) -> tuple[cProfile.Profile, cProfile.Profile]:
    """Profile the forward passes and the backward passes of a model."""
    profiles = cProfile.Profile(time.process_time), cProfile.Profile(time.process_time)
    clock, run = time.process_time, models(True)[contender]
    for _ in range(SETTLING):
        run()
    marks = 0

    def marked() -> float:  # a pass asks for the time thrice: before forward, between, and after backward
        nonlocal marks
        if marks % 3:
            profiles[marks % 3 - 1].disable()
        if marks % 3 < 2:
            profiles[marks % 3].enable()
        marks += 1
        return clock()

    time.process_time = marked
    try:
        for _ in range(steps):
            run()
    finally:
        time.process_time = clock
    return profiles


def own_time(profile: cProfile.Profile) -> dict[str, float]:
    """Return seconds by file; those of a built-in function count for its callers."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if file != "~":
            seconds[short(file)] += own
        elif not callers:
            seconds["torch, called from C"] += own
        for (caller, _, _), (_, _, share, _) in callers.items() if file == "~" else ():
            seconds["torch, called from C" if caller == "~" else short(caller)] += share
    return dict(seconds)


def short(file: str) -> str:
    """Return a file's path from the package that it belongs to."""
    parts = Path(file).parts
    for package in ("mmmae_kernels", "mmmae", "torch", "triton"):
        if package in parts[:-1]:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return Path(file).name


def table(found: Sequence[Host]) -> Table:
    """Return a table of ratios to the first contender of each case, and of microseconds."""
    made = Table(title=f"host time, process time, best of {ROUNDS} rounds; ratios to the first of each case")
    for heading in ("case", "contender", "forward", "backward", "both", "us"):
        made.add_column(heading, justify="left" if heading in ("case", "contender") else "right")
    for host in found:
        for name, ratios in host.ratios().items():
            case = host.case if name == next(iter(host.contenders)) else ""
            made.add_row(case, name, *(f"{ratio:.2f}" for ratio in ratios), f"{host.contenders[name][2] * 1e6:.0f}")
        made.add_section()
    return made


if __name__ == "__main__":
    main()

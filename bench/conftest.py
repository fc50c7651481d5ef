"""Options, the timer that times nothing wrong, and the tables at the end of a run."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

import mmmae
from mmmae.profiling import Report
from mmmae.profiling.counting import StepCost, count_step

Run = Callable[[], Sequence[Tensor]]
Setup = Callable[..., Mapping[str, Run]]

MEDIANS = pytest.StashKey[dict[str, dict[str, float]]]()
REPORTS = pytest.StashKey[dict[str, Report]]()
STEPS = pytest.StashKey[dict[str, dict[str, StepCost]]]()
STEP_BATCH = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmmae")
    group.addoption("--benchmark", action="store_true", help="take times too; without it only exact counts are checked")
    group.addoption("--quick", action="store_true", help="smaller cases and fewer rounds: below a minute in all")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEDIANS], config.stash[REPORTS], config.stash[STEPS] = {}, {}, {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--benchmark"):
        skip = pytest.mark.skip(reason="times are taken with --benchmark")
        for item in items:
            if "timed" in getattr(item, "fixturenames", ()):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Callable[[str], Report]:
    """The profile of a preset, counted once a session."""
    reports = request.config.stash[REPORTS]

    def of(preset: str) -> Report:
        if preset not in reports:
            reports[preset] = mmmae.profile(preset)
        return reports[preset]

    return of


@pytest.fixture(scope="session")
def steps(request: pytest.FixtureRequest) -> Callable[[str], dict[str, StepCost]]:
    """What a training step of a preset costs in saved bytes and launches, of each model, counted once a session."""
    counted = request.config.stash[STEPS]

    def of(preset: str) -> dict[str, StepCost]:
        if preset not in counted:
            config = mmmae.MMMAEConfig.preset(preset)
            with torch.device("meta"):
                models: dict[str, mmmae.FastModel | mmmae.ReferenceModel] = {
                    "fast": mmmae.FastModel(config),
                    "reference sdpa": mmmae.ReferenceModel(config, "sdpa"),
                    "reference eager": mmmae.ReferenceModel(config, "eager"),
                }
            counted[preset] = {name: count_step(model, STEP_BATCH) for name, model in models.items()}
        return counted[preset]

    return of


@dataclasses.dataclass
class Case:
    """The variants of a case, what the first one gives, and how long each took in each round."""

    variants: Mapping[str, Run]
    expected: Sequence[Tensor]
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def check(self, name: str, variant: str, tolerance: float) -> None:
        """Fail if a variant does not give what the first one gives."""
        for index, (ours, theirs) in enumerate(zip(self.variants[variant](), self.expected, strict=True)):
            error = relative_error(ours, theirs)
            assert error <= tolerance, f"{name}: output {index} of {variant} is off by {error:.1e}, so it is not timed"

    def time(self, rounds: int) -> None:
        """One run of each variant a round, so that a slow moment of the machine hits all of them."""
        self.seconds = {variant: [] for variant in self.variants}
        for _ in range(rounds):
            for variant, run in self.variants.items():
                start = time.perf_counter()
                run()
                self.seconds[variant].append(time.perf_counter() - start)


@pytest.fixture(scope="session")
def prepare() -> Callable[..., Case]:
    """A case, set up once; only the last one is kept in memory."""
    kept: dict[str, Case] = {}

    def of(name: str, setup: Setup, *arguments: object) -> Case:
        if name not in kept:
            kept.clear()
            variants = setup(*arguments)
            kept[name] = Case(variants, next(iter(variants.values()))())
        return kept[name]

    return of


@pytest.fixture
def timed(request: pytest.FixtureRequest, prepare) -> Callable[..., None]:  # type: ignore[no-untyped-def]
    """Check that a variant gives what the first variant of its case gives, then report its times.

    The first variant is the baseline of the ratios. A variant that the setup left out can't run on this machine. The
    rounds of a case's variants are interleaved; pytest-benchmark gets the times by a timer that replays them.
    """

    def run(name: str, variant: str, setup: Setup, *arguments: object, tolerance: float, rounds: int) -> None:
        case = prepare(name, setup, *arguments)
        if variant not in case.variants:
            pytest.skip(f"{variant} does not serve {name} here")
        case.check(name, variant, tolerance)
        if not case.seconds:
            case.time(rounds)
        request.node.add_marker(pytest.mark.benchmark(group=name, timer=replay(case.seconds[variant])))
        request.getfixturevalue("benchmark").pedantic(lambda: None, rounds=rounds)
        medians = request.config.stash[MEDIANS].setdefault(name, {next(iter(case.variants)): float("nan")})
        medians[variant] = statistics.median(case.seconds[variant])

    return run


def replay(seconds: Sequence[float]) -> Callable[[], float]:
    """A timer whose every second answer is later than the one before by the next of `seconds`."""
    answers = itertools.chain.from_iterable((0.0, duration) for duration in seconds)
    return lambda: next(answers)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm."""
    difference = torch.linalg.vector_norm((ours - theirs).double())
    return float(difference / torch.linalg.vector_norm(theirs.double()).clamp(min=torch.finfo(torch.float32).tiny))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    page = io.StringIO()
    console = Console(file=page, width=110)
    if config.stash[REPORTS]:
        table = Table(box=box.SIMPLE, title="one sample, forward, counted like fvcore: one multiply-add is one FLOP")
        heads = ("M parameters", "encoder GMAC", "encoder GFLOP (2x)", "pretraining GMAC", "MB moved", "launches")
        for head in ("preset", *heads, "budget"):
            table.add_column(head, justify="left" if head in ("preset", "budget") else "right")
        for preset, report in config.stash[REPORTS].items():
            total, macs = report.pretraining.total, report.encoder.total.macs
            amounts = [f"{total.parameters / 1e6:.2f}", f"{macs / 1e9:.2f}", f"{2 * macs / 1e9:.2f}"]
            amounts += [f"{total.macs / 1e9:.2f}", f"{total.bytes / 1e6:,.1f}", f"{total.launches:,}"]
            table.add_row(preset, *amounts, report.notes[-1].split(":")[0].split(",")[0])
        console.print(table)
    if config.stash[STEPS]:
        table = Table(box=box.SIMPLE, title=f"training step, batch {STEP_BATCH}, forward and backward, counted")
        for head in ("preset", "model", "saved MB", "of reference sdpa", "of reference eager", "launches"):
            table.add_column(head, justify="left" if head in ("preset", "model") else "right")
        for preset, step in config.stash[STEPS].items():
            for name, cost in step.items():
                shares = [cost.saved_bytes / step[f"reference {kind}"].saved_bytes for kind in ("sdpa", "eager")]
                amounts = [
                    f"{cost.saved_bytes / 1e6:,.1f}",
                    *(f"{share:.3f}" for share in shares),
                    f"{cost.launches:,}",
                ]
                table.add_row(preset, name, *amounts)
        console.print(table)
    if config.stash[MEDIANS]:
        load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        machine = f"{torch.get_num_threads()} threads{load}, torch {torch.__version__}"
        table = Table(box=box.SIMPLE, title=f"medians and ratios to each case's first line, {machine}")
        for head in ("case", "variant", "median, ms", "ratio"):
            table.add_column(head, justify="left" if head in ("case", "variant") else "right")
        for case, medians in config.stash[MEDIANS].items():
            baseline = next(iter(medians.values()))
            for number, (variant, median) in enumerate(medians.items()):
                table.add_row("" if number else case, variant, f"{1e3 * median:,.2f}", f"{median / baseline:.3f}")
        console.print(table)
    terminalreporter.write(page.getvalue())

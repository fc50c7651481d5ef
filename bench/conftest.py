"""The suite's options, the fixtures that time nothing wrong, and the report at the end of a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import bench.options
import mmmae
from bench.contenders import PEERS
from bench.found import Found
from bench.op_cases import CASES
from bench.op_race import OpRace, measure_speeds
from bench.options import Options
from bench.page_tables import title_of
from bench.race import BASELINE, Entry, Result, race
from bench.results import Measurement
from mmmae.cost import Report
from mmmae.cost.counting import StepCost, count_step

STEP_BATCH = 8


FOUND = pytest.StashKey[Found]()


def pytest_addoption(parser: pytest.Parser) -> None:
    bench.options.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = Found()
    options = Options.of(config)
    if options.only is not None and options.only not in CASES:
        raise pytest.UsageError(f"--only is {options.only!r}, must be one of {', '.join(CASES)}")
    if options.results.exists() and not options.results.is_dir():
        raise pytest.UsageError(f"--results is {options.results}, which is no folder")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device is cuda, and torch finds no GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    options = Options.of(config)
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if not options.benchmark and {"timed", "raced"} & set(fixtures):
            item.add_marker(pytest.mark.skip(reason="times are taken with --benchmark"))
        elif options.only is not None and "timed" not in fixtures:
            item.add_marker(pytest.mark.skip(reason=f"only {options.only} is asked for"))


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest) -> Found:
    return request.config.stash[FOUND]


@pytest.fixture(scope="session")
def report(found: Found) -> Callable[[str], Report]:
    """The profile of a preset, counted once a session."""

    def of(preset: str) -> Report:
        if preset not in found.reports:
            found.reports[preset] = mmmae.profile(preset)
        return found.reports[preset]

    return of


@pytest.fixture(scope="session")
def steps(found: Found) -> Callable[[str], dict[str, StepCost]]:
    """What a training step of a preset costs in saved bytes and launches, of each model, counted once a session."""

    def of(preset: str) -> dict[str, StepCost]:
        if preset not in found.steps:
            config = mmmae.MMMAEConfig.preset(preset)
            with torch.device("meta"):
                models: dict[str, mmmae.FastModel | mmmae.ReferenceModel] = {
                    "fast": mmmae.FastModel(config),
                    "reference sdpa": mmmae.ReferenceModel(config, "sdpa"),
                    "reference eager": mmmae.ReferenceModel(config, "eager"),
                }
            found.steps[preset] = {name: count_step(model, STEP_BATCH) for name, model in models.items()}
        return found.steps[preset]

    return of


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line on the progress, captured output or not."""
    plugins = request.config.pluginmanager
    reporter, capture = plugins.getplugin("terminalreporter"), plugins.getplugin("capturemanager")

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"  {text}", light=True)

    return line


@pytest.fixture
def benchmarked(request: pytest.FixtureRequest, found: Found) -> Callable[[Measurement], None]:
    """Keeps a measurement, and hands it to pytest-benchmark by a timer that replays the rounds."""

    def keep(measurement: Measurement) -> None:
        found.measurements.append(measurement)
        group = title_of(measurement)
        request.node.add_marker(pytest.mark.benchmark(group=group, timer=replay(measurement.seconds)))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.pedantic(lambda: None, rounds=len(measurement.seconds))
        facts = dataclasses.asdict(measurement)
        benchmark.extra_info.update({name: facts[name] for name in facts.keys() - {"seconds", "group", "case"}})
        benchmark.extra_info.update(measurement.rates)

    return keep


@pytest.fixture(scope="session")
def op_race(request: pytest.FixtureRequest, found: Found, tell: Callable[[str], None]) -> Callable[[str], OpRace]:
    """The comparison of an op's variants, timed; only the last one is kept in memory."""
    options, kept = Options.of(request.config), {}

    def of(op: str) -> OpRace:
        if not found.speeds:
            tell("a copy and a matrix product, for the limits")
            found.speeds = measure_speeds(options.device, options.dtype)
        if op not in kept:
            kept.clear()
            tell(f"{op}: every variant in turn")
            kept[op] = OpRace(op, options)
            kept[op].run(rounds=5 if options.quick else 9)
        return kept[op]

    return of


@pytest.fixture
def timed(op_race: Callable[[str], OpRace], found: Found, benchmarked: Callable[[Measurement], None]) -> Any:
    """Check that a variant of an op gives what the first one gives, then report its times.

    A variant that the case leaves out can't run on this machine.
    """

    def run(op: str, variant: str) -> None:
        compared = op_race(op)
        if variant not in compared.variants:
            pytest.skip(f"{variant} does not serve {op} here")
        complaint = compared.complaint(variant)
        assert not complaint, f"{op}: {variant}: {complaint}"
        measurement = Measurement(
            group="op",
            case=f"{op}, batch {compared.batch}",
            contender=variant,
            seconds=compared.seconds[variant],
            baseline=variant == next(iter(compared.variants)),
            dtype=compared.dtype,
            device=compared.device,
            backend=variant,
            samples=compared.batch,
            macs=compared.macs or None,
            bytes=compared.work.bytes,
            limit=compared.limit(found.speeds),
        )
        benchmarked(measurement)

    return run


@pytest.fixture(scope="session")
def model_race(tell: Callable[[str], None]) -> Callable[..., dict[Entry, Result]]:
    """A comparison of models, run once; only the last one is kept."""
    kept: dict[int, dict[Entry, Result]] = {}

    def of(case: Any) -> dict[Entry, Result]:
        if id(case) not in kept:
            kept.clear()
            entries = [entry for entry in case.entries if not lacks(entry)]
            kept[id(case)] = race(entries, case.rounds, warm_ups=case.warm_ups, exact=case.exact, tell=tell)
        return kept[id(case)]

    return of


@pytest.fixture
def raced(model_race: Callable[..., dict[Entry, Result]], benchmarked: Callable[[Measurement], None]) -> Any:
    """Run the comparison that an entry is in, and report the entry's times, or fail if it gave something wrong."""

    def run(case: Any, entry: Entry) -> None:
        if lacks(entry):
            pytest.skip(lacks(entry))
        results = model_race(case)
        result, task = results[entry], entry.task
        assert not result.error, f"{entry.contender}: {result.error}"
        fast = next((results[rival] for rival in results if rival.task == task and results[rival].limit), None)
        measurement = Measurement(
            group=case.group,
            case=task.title,
            contender=entry.contender,
            seconds=result.seconds,
            baseline=entry.contender == BASELINE,
            dtype=task.dtype,
            device=task.device,
            allocator=case.allocator,
            x=None if case.varied is None else case.varied(task),
            samples=task.batch,
            gemms=fast.gemms if fast else None,
            limit=fast.limit if fast else None,
            resident_bytes=result.resident_bytes,
            **result.counts,
        )
        benchmarked(measurement)

    return run


def lacks(entry: Entry) -> str:
    """What is not installed that a contender needs, or nothing."""
    if entry.contender in PEERS and importlib.util.find_spec("transformers") is None:
        return f"{entry.contender} needs transformers: pip install '.[peers]'"
    return ""


def replay(seconds: Sequence[float]) -> Callable[[], float]:
    """A timer whose every second answer is later than the one before by the next of `seconds`."""
    answers = itertools.chain.from_iterable((0.0, duration) for duration in seconds)
    return lambda: next(answers)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    from bench.report import finish

    finish(terminalreporter, Options.of(config), config.stash[FOUND])

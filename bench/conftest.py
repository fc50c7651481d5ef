"""The suite's options, the two fixtures that all its tests take, and the report at the end of a run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

import bench.options
from bench.op_cases import CASES
from bench.options import Options
from bench.page_tables import title_of
from bench.report import finish
from bench.results import Measurement, Record
from bench.suite import Suite

SUITE = pytest.StashKey[Suite]()


def pytest_addoption(parser: pytest.Parser) -> None:
    bench.options.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    options = Options.of(config)
    if options.only is not None and options.only not in CASES:
        raise pytest.UsageError(f"--only is {options.only!r}, must be one of {', '.join(CASES)}")
    if options.results.exists() and not options.results.is_dir():
        raise pytest.UsageError(f"--results is {options.results}, which is not a folder")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device is cuda, but torch finds no GPU")
    config.stash[SUITE] = Suite(options, tell=lambda text: show(config, text))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if Options.of(session.config).benchmark and session.config.getoption("dist", "no") != "no":
        reason = "--benchmark times one measurement after another; run it without -n and --dist"
        pytest.exit(reason, returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only = Options.of(config).only
    for item in items:
        if only is not None and not {"record", "op"} <= set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason=f"only {only} is asked for"))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    finish(terminalreporter, config.stash[SUITE])


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Suite:
    """The run: options, what was found so far, and comparisons that several tests share."""
    return request.config.stash[SUITE]


@pytest.fixture
def record(request: pytest.FixtureRequest, suite: Suite) -> Record:
    """Keeps a measurement and shows it in pytest-benchmark's table; a test that takes it runs with `--benchmark` only.

    The rounds were timed in turn with others, so that pytest-benchmark's timer replays them.
    """
    if not suite.options.benchmark:
        pytest.skip("times are taken with --benchmark")

    def keep(measurement: Measurement) -> None:
        suite.measurements.append(measurement)
        timer = replay(measurement.seconds)
        request.node.add_marker(pytest.mark.benchmark(group=title_of(measurement), timer=timer))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.pedantic(lambda: None, rounds=len(measurement.seconds))
        facts = dataclasses.asdict(measurement)
        benchmark.extra_info.update({name: facts[name] for name in facts.keys() - {"seconds", "group", "case"}})
        benchmark.extra_info.update(measurement.rates)

    return keep


def replay(seconds: Sequence[float]) -> Callable[[], float]:
    """Return a timer whose every second answer is later than the one before by the next of `seconds`."""
    answers = itertools.chain.from_iterable((0.0, duration) for duration in seconds)
    return lambda: next(answers)


def show(config: pytest.Config, text: str) -> None:
    """Print a line on the progress, whether output is captured or not."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    assert reporter is not None
    assert capture is not None
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(f"  {text}", light=True)

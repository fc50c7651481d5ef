"""Times of a training step and of encoding: ours, the reference and peers, each in a process of its own."""

from __future__ import annotations

import pytest

from bench.contenders import refuses
from bench.model_cases import ModelCase, plan
from bench.options import Options
from bench.race import Entry
from bench.results import Record, by_case
from bench.suite import Suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        cases = plan(Options.of(metafunc.config))
        rows = [(case, entry) for case in cases for entry in case.entries]
        ids = [f"{case.group}: {entry.task.title}: {entry.contender}" for case, entry in rows]
        metafunc.parametrize(("case", "entry"), rows, ids=ids)


def test_time_of(suite: Suite, record: Record, case: ModelCase, entry: Entry) -> None:
    """Time one contender on one task, round by round in turn with the other entries of the case.

    The cases are those of `bench.model_cases.plan`. The baseline is the reference with SDPA; who differs from it in
    the loss or in a parameter's gradient is not timed.
    """
    reason = refuses(entry.contender)
    if reason is not None:
        pytest.skip(reason)
    results = suite.model_race(case)
    assert not results[entry].error, f"{entry.contender}: {results[entry].error}"
    record(case.measurement(entry, results))


def test_the_fast_model_is_faster_than_the_plain_reference(suite: Suite) -> None:
    """Holds on any machine, whatever else was found on one; `tiny` is all overhead and says nothing."""
    slower = [
        f"{case}: fast takes {fast.median / plain.median:.2f} times as long"
        for (_, case, _), measured in by_case(suite.measurements).items()
        for plain in measured
        for fast in measured
        if (plain.contender, fast.contender) == ("reference, plain", "fast") and not case.startswith("tiny")
        if fast.median > plain.median
    ]
    assert not slower, "; ".join(slower)

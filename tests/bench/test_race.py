"""The bench suite's comparison of models: what is wrong is not timed, and nothing hangs."""

import re

import pytest

from bench import race as module
from bench.contenders import Task
from bench.race import Entry, Runner, race

TASK = Task("training step", "tiny", batch=2, aux=True)
REFERENCE, FAST = Entry("reference, SDPA", TASK), Entry("fast", TASK, kept=True)


@pytest.fixture
def broken(monkeypatch):
    """Break the fast model in the contenders' processes; the reference has none of it."""

    def by(kind):
        monkeypatch.setattr(Runner, "module", "tests.bench.broken_worker")
        monkeypatch.setenv("BROKEN", kind)

    return by


def run(rounds=2, **how):
    return race([REFERENCE, FAST], rounds, tell=lambda text: None, **how)


def test_a_race_times_and_counts_both():
    results = run()
    for result in results.values():
        assert result.error == ""
        assert len(result.seconds) == 2
        assert result.resident_bytes > result.counts["peak_bytes"] > result.counts["saved_bytes"] > 0
        assert result.counts["macs"] > 0
    assert results[FAST].counts["saved_bytes"] < results[REFERENCE].counts["saved_bytes"]
    assert 0 < results[FAST].gemms < results[FAST].limit < 1


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("off", r"is off by .*, expected at most 1.0e-04, so it is not timed"),
        ("infinite", r"is not finite, so it is not timed"),
        ("dead", "its process ended with status 3"),
    ],
)
def test_what_is_wrong_is_not_timed(broken, kind, complaint):
    broken(kind)
    results = run(exact=False)
    assert results[FAST].seconds == []
    assert re.search(complaint, results[FAST].error)
    assert len(results[REFERENCE].seconds) == 2


def test_a_process_that_hangs_is_ended(broken, monkeypatch):
    broken("stuck")
    monkeypatch.setattr(module, "PATIENCE", 15.0)
    results = run(exact=False)
    assert "status -9" in results[FAST].error
    assert len(results[REFERENCE].seconds) == 2


def test_a_slower_fast_model_is_seen(broken):
    broken("slow")
    results = run(exact=False)
    assert min(results[FAST].seconds) > 0.2
    assert min(results[REFERENCE].seconds) < 0.2


def test_a_contender_that_can_not_do_a_task_says_why():
    task = Task("training step", "tiny", overrides=(("bands", 9),))
    pytest.importorskip("transformers")
    peer = Entry("ViTMAE, SDPA", task)
    results = race([peer], 1, exact=False, tell=lambda text: None)
    assert "3 groups of bands" in results[peer].error

"""The bench suite's comparison of models: what is wrong is not timed, and nothing hangs."""

import re
import threading

import pytest

from bench import worker
from bench.contenders import Task, Work
from bench.race import PATIENCE, Entry, Runner, race

TASK = Task("training step", "tiny", batch=2, aux=True)
REFERENCE, FAST = Entry("reference, SDPA", TASK), Entry("fast", TASK, kept=True)


@pytest.fixture
def toy(monkeypatch):
    """A function that has contenders answer without doing any work, the fast one broken in some way."""

    def broken(kind):
        monkeypatch.setattr(Runner, "module", "tests.bench.toy_worker")
        monkeypatch.setenv("BROKEN", kind)

    return broken


def run(**how):
    return race([REFERENCE, FAST], 2, tell=lambda text: None, **how)


def test_a_race_times_and_counts_both():
    results = run(warm_ups=1)
    for result in results.values():
        assert result.error == ""
        assert len(result.seconds) == 2
        assert min(result.seconds) > 0
        assert result.resident_bytes > result.counts["peak_bytes"] > result.counts["saved_bytes"] > 0
        assert result.counts["macs"] > 0
    assert results[FAST].counts["saved_bytes"] < results[REFERENCE].counts["saved_bytes"]
    assert 0 < results[FAST].gemms < results[FAST].limit


def test_a_race_keeps_what_each_process_measured(toy):
    toy("")
    results = run(exact=False)
    assert [(result.seconds, result.error) for result in results.values()] == [([0.3, 0.3], ""), ([0.2, 0.2], "")]


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("off", r"loss is off by 1.0e-02, expected at most 1.0e-04, so it is not timed"),
        ("infinite", r"loss is not finite, so it is not timed"),
        ("other", r"gradient is among its outputs or the expected ones, not both, so it is not timed"),
        ("dead", r"its process ended with status 3"),
        ("unable", r"ValueError: it can't do that"),
    ],
)
def test_what_is_wrong_is_not_timed(toy, kind, complaint):
    toy(kind)
    results = run(exact=False)
    assert results[FAST].seconds == []
    assert re.search(complaint, results[FAST].error)
    assert len(results[REFERENCE].seconds) == 2


def test_a_process_that_hangs_is_ended(toy, monkeypatch, tmp_path):
    """When its time is up, which is here when it says that it hangs, however long that takes."""
    stuck = tmp_path / "stuck"

    class Timer(threading.Thread):
        def __init__(self, seconds, end):
            super().__init__(daemon=True)
            assert seconds == PATIENCE
            self.end, self.over = end, threading.Event()

        def run(self):
            while not self.over.wait(0.01):
                if stuck.exists():
                    stuck.unlink()
                    return self.end()

        def cancel(self):
            self.over.set()

    toy("stuck")
    monkeypatch.setenv("STUCK", str(stuck))
    monkeypatch.setattr(Runner, "timer", Timer)
    results = run(exact=False)
    assert "status -9" in results[FAST].error
    assert len(results[REFERENCE].seconds) == 2


def test_a_round_takes_what_the_clock_says(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    class Sleep:
        task = TASK

        def run(self):
            clock.now += 0.25

    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    assert worker.run_round(Sleep())["seconds"] == 0.25


def test_a_contender_that_can_not_do_a_task_says_why():
    with pytest.raises(ValueError, match="3 groups of bands can't become smaller patches, expected a square"):
        Work("ViTMAE, SDPA", Task("training step", "tiny", overrides=(("bands", 9),)))

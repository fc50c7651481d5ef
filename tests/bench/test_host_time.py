"""The measurement of host time: other work on the machine does not change a ratio."""

import itertools

import pytest

pytest.importorskip("triton", reason="needs triton")

from bench.host_time import ROUNDS, SETTLING, SWEEPS, Host, Seconds, measure


def noisy(forward, backward, quiet):
    """Return a pass that takes three times as long except in the round `quiet`."""
    rounds = itertools.count(-SETTLING)

    def run():
        factor = 1 if next(rounds) == quiet else 3
        return Seconds(factor * forward, factor * backward)

    return run


def test_one_quiet_round_of_each_contender_gives_the_ratios():
    passes = {"eager": noisy(1.0, 2.0, quiet=0), "native": noisy(0.5, 3.0, quiet=SWEEPS * ROUNDS - 1)}
    (host,) = measure({"op": passes})
    assert host.case == "op"
    assert host.ratios() == {"eager": (1.0, 1.0, 1.0), "native": (0.5, 1.5, 3.5 / 3.0)}


def test_the_best_of_two_measurements_is_taken_of_each_contender_before_the_ratio():
    first = Host("op", {"eager": (1.0, 4.0, 5.0), "native": (3.0, 3.0, 6.0)})
    second = Host("op", {"eager": (2.0, 2.0, 4.0), "native": (1.0, 9.0, 10.0)})
    assert first.best_of(second) == Host("op", {"eager": (1.0, 2.0, 4.0), "native": (1.0, 3.0, 6.0)})
    assert first.best_of(second).ratios()["native"] == (1.0, 1.5, 1.5)

"""The measurement of host time: what else runs on the machine meanwhile does not change a ratio."""

import itertools

import pytest

pytest.importorskip("triton", reason="needs triton")

from bench.host_time import ROUNDS, SETTLING, SWEEPS, Seconds, measure


def noisy(forward, backward, quiet):
    """Return a pass of two calls that take three times as long except in one call of the round `quiet`."""
    rounds = itertools.count(-SETTLING)

    def run():
        factor = 1 if next(rounds) == quiet else 3
        return [Seconds(3 * forward, 3 * backward), Seconds(factor * forward, factor * backward)]

    return run


def test_one_quiet_call_of_each_contender_gives_the_ratios():
    passes = {"eager": noisy(1.0, 2.0, quiet=0), "native": noisy(0.5, 3.0, quiet=SWEEPS * ROUNDS - 1)}
    (host,) = measure({"op": passes})
    assert host.case == "op"
    assert host.ratios() == {"eager": (1.0, 1.0, 1.0), "native": (0.5, 1.5, 3.5 / 3.0)}

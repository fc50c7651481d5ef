"""The comparison of two runs of the bench suite: what counts as a regression, and what can't be compared."""

import dataclasses

import pytest

from bench.compare import main
from bench.results import Measurement, Results

CASE = {"group": "training step", "case": "base, batch 4"}
OP = {"group": "op", "case": "patch_embed, batch 8"}
MEASUREMENTS = (
    Measurement(**CASE, contender="reference, SDPA", seconds=[4.0, 4.1, 3.9], baseline=True, saved_bytes=900),
    Measurement(
        **CASE, contender="fast", seconds=[2.0, 2.1, 1.9], saved_bytes=600_000, macs=10**9, peak_bytes=1_000_000
    ),
    Measurement(**CASE, contender="ViTMAE, SDPA", seconds=[3.0]),
    Measurement(**OP, contender="gather, F.linear", seconds=[0.010], baseline=True),
    Measurement(**OP, contender="native", seconds=[0.005]),
    Measurement(**OP, contender="triton"),
)
NATIVE = 4


@pytest.fixture
def compare(tmp_path, capsys):
    """A function that compares two runs, each given by its measurements, its text or None for no file."""

    def run(old, new, *options, machine="here"):
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, measurements, name in zip(paths, (old, new), ("here", machine), strict=True):
            if isinstance(measurements, str):
                path.write_text(measurements)
            elif measurements is not None:
                path.write_text(Results("", "", {"name": name}, {}, {}, {}, list(measurements)).to_json())
        try:
            status = main([*map(str, paths), *options])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, " ".join((printed.out + printed.err).split())

    return run


def changed(number, **fields):
    """Return the measurements with one of them changed; `slower` is a factor."""
    changed = list(MEASUREMENTS)
    slower = fields.pop("slower", 1.0)
    seconds = [slower * duration for duration in changed[number].seconds]
    changed[number] = dataclasses.replace(changed[number], **{"seconds": seconds, **fields})
    return changed


def test_a_run_is_no_worse_than_itself(compare):
    status, printed = compare(MEASUREMENTS, MEASUREMENTS)
    assert (status, printed) == (0, "none of 5 figures got worse by more than is allowed")


def test_a_slower_fast_model_is_a_regression(compare):
    status, printed = compare(MEASUREMENTS, changed(1, slower=1.2))
    assert status == 1
    assert "2.000 1.667 1.200" in printed
    assert printed.endswith("1 of 5 figures got worse by more than is allowed")


def test_a_faster_baseline_that_leaves_us_behind_is_a_regression(compare):
    status, printed = compare(MEASUREMENTS, changed(3, slower=0.5))
    assert status == 1
    assert "native" in printed
    assert "2.000 1.000 2.000" in printed


def test_a_slower_machine_is_none(compare):
    slower = [dataclasses.replace(one, seconds=[3 * duration for duration in one.seconds]) for one in MEASUREMENTS]
    assert compare(MEASUREMENTS, slower)[0] == 0


@pytest.mark.parametrize(
    "better", [changed(1, slower=0.5), changed(0, slower=2.0), changed(1, saved_bytes=1, macs=1, peak_bytes=1)]
)
def test_what_is_better_is_none(compare, better):
    assert compare(MEASUREMENTS, better)[0] == 0


def test_others_may_become_slower(compare):
    assert compare(MEASUREMENTS, changed(2, slower=2.0))[0] == 0
    assert compare(MEASUREMENTS, changed(0, saved_bytes=9_000))[0] == 0


@pytest.mark.parametrize(("slower", "allow", "status"), [(1.09, "1.1", 0), (1.2, "1.25", 0), (1.09, "1.05", 1)])
def test_as_much_is_allowed_as_is_said(compare, slower, allow, status):
    assert compare(MEASUREMENTS, changed(1, slower=slower), "--allow", allow)[0] == status


@pytest.mark.parametrize(
    ("field", "amount", "status"),
    [
        ("saved_bytes", 605_000, 0),
        ("saved_bytes", 607_000, 1),
        ("macs", 1_005_000_000, 0),
        ("macs", 1_011_000_000, 1),
        ("peak_bytes", 1_090_000, 0),
        ("peak_bytes", 1_110_000, 1),
    ],
)
def test_counts_may_grow_by_as_much_as_they_vary(compare, field, amount, status):
    found, printed = compare(MEASUREMENTS, changed(1, **{field: amount}))
    assert found == status
    assert (field in printed) == bool(status)


def test_the_worst_comes_first(compare):
    worse = changed(1, slower=1.2)
    worse[NATIVE] = dataclasses.replace(worse[NATIVE], seconds=[0.008])
    status, printed = compare(MEASUREMENTS, worse)
    assert status == 1
    assert printed.index("1.600") < printed.index("1.200")


@pytest.mark.parametrize("unknown", [{"seconds": []}, {"saved_bytes": None, "peak_bytes": None, "macs": None}])
def test_what_is_unknown_is_not_compared(compare, unknown):
    status, printed = compare(changed(1, **unknown), MEASUREMENTS)
    assert status == 0
    assert "only in the newer run: training step, base, batch 4" in printed
    assert compare(MEASUREMENTS, changed(1, **unknown))[0] == 0


def test_cases_of_one_run_are_listed(compare):
    status, printed = compare(MEASUREMENTS, MEASUREMENTS[:3])
    assert status == 0
    assert "only in the older run: op, patch_embed, batch 8, float32, cpu, memory own: native, times as fast" in printed
    assert "only in the newer run" in compare(MEASUREMENTS[3:], MEASUREMENTS)[1]


def test_another_baseline_is_another_figure(compare):
    renamed = changed(3, contender="Conv3d, gather", seconds=[0.001])
    status, printed = compare(MEASUREMENTS, renamed)
    assert status == 0
    assert "times as fast as Conv3d, gather" in printed


def test_other_machines_are_pointed_out(compare):
    status, printed = compare(MEASUREMENTS, MEASUREMENTS, machine="there")
    assert status == 0
    assert printed.startswith(
        "warning: the machines differ, here with None threads and there with None threads, so ratios can differ too"
    )


@pytest.mark.parametrize(
    ("old", "new", "options", "complaint"),
    [
        (MEASUREMENTS[:3], MEASUREMENTS[3:], (), "have no figure of ours in common"),
        ([], MEASUREMENTS, (), "have no figure of ours in common"),
        (None, MEASUREMENTS, (), "old.json: No such file or directory"),
        (MEASUREMENTS, "[1, 2]", (), "new.json: not a results file of the bench suite"),
        (MEASUREMENTS, "times", (), "new.json: not a results file of the bench suite"),
        (MEASUREMENTS, '{"format": 0}', (), "new.json: format is 0, expected 1"),
        (MEASUREMENTS, MEASUREMENTS, ("--allow", "0.9"), "--allow is 0.9, expected a number >= 1"),
        (MEASUREMENTS, MEASUREMENTS, ("--allow", "nan"), "--allow is nan, expected a number >= 1"),
    ],
)
def test_what_can_not_be_compared_is_an_error(compare, old, new, options, complaint):
    status, printed = compare(old, new, *options)
    assert status == 2
    assert complaint in printed

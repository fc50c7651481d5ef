"""The comparisons of models that a run times: bfloat16 beside float32, and no contender of a case twice."""

import itertools

import pytest

from bench import model_cases
from bench.model_cases import COMPILED, ENCODING, TRAINING, plan
from bench.options import Options
from bench.race import BASELINE, Result


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Return a function that plans a run on a CPU with or without instructions for bfloat16."""

    def make(instructions=True, dtype="float32", **options):
        monkeypatch.setattr(model_cases, "has_bf16_instructions", lambda: instructions)
        given = {"quick": False, "full": False, "preset": None, **options}
        return plan(Options(True, **given, batch=None, device="cpu", dtype=dtype, only=None, results=tmp_path))

    return make


def halves(cases):
    return [case for case in cases if len({entry.task.dtype for entry in case.entries}) > 1]


@pytest.mark.parametrize("options", [{"quick": True}, {}, {"full": True}, {"preset": "vit"}], ids=str)
def test_no_two_measurements_have_the_same_place(planned, options):
    places = [
        (one.group, one.case, one.allocator, one.contender, one.x)
        for case in planned(**options)
        for one in (case.measurement(entry, {entry: Result() for entry in case.entries}) for entry in case.entries)
    ]
    assert len(places) == len(set(places))


def test_ours_and_the_reference_in_float32_race_against_those_in_bfloat16(planned):
    step, encoding = halves(planned())
    assert [case.group for case in (step, encoding)] == [TRAINING, ENCODING]
    results = {entry: Result(seconds=[1.0]) for entry in step.entries}
    measured = [step.measurement(entry, results) for entry in step.entries]
    assert {(one.group, one.case) for one in measured} == {(TRAINING, "base, batch 4, bfloat16")}
    assert [(one.contender, one.dtype, one.baseline) for one in measured] == [
        (BASELINE, "bfloat16", True),
        (COMPILED, "bfloat16", False),
        ("fast", "bfloat16", False),
        (f"{BASELINE}, float32", "float32", False),
        ("fast, float32", "float32", False),
    ]
    for entries in (step.entries, encoding.entries):  # a race compares with the first entry of a task
        first = {task: next(group).contender for task, group in itertools.groupby(entries, lambda entry: entry.task)}
        assert set(first.values()) == {BASELINE}


def test_a_full_run_has_a_peer_in_bfloat16_and_both_presets(planned):
    found = [case for case in halves(planned(full=True)) if case.group == TRAINING]
    assert [case.entries[0].task.preset for case in found] == ["base", "vit"]
    for case in found:
        assert "ViTMAE, SDPA" in [entry.contender for entry in case.entries]


@pytest.mark.parametrize("options", [{"instructions": False}, {"dtype": "bfloat16"}, {"quick": True}], ids=str)
def test_bfloat16_is_left_out_where_it_is_slow_or_not_asked_for_beside_float32(planned, options):
    assert halves(planned(**options)) == []

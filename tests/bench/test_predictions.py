"""The predictions for GPUs: floors from counts and peaks, which never stand among what was measured."""

from pathlib import Path

import pytest

from bench import predictions
from bench.op_cases import CASES
from bench.predictions import BATCH, GPU, GPUS, Work, floor, markdown, predict, speedup_bound
from bench.results import Prediction
from mmmae.cost.counting import Cost
from mmmae_kernels.cpu import library as native

PAGE = Path(__file__).parents[2] / "docs" / "gpus.md"
NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


@pytest.fixture(scope="module")
def predicted() -> list[Prediction]:
    return predict()


def test_a_floor_is_the_sum_of_what_bounds_each_operator():
    gpu = GPU(flops=1000.0, bandwidth=10.0)
    product, copy = Cost(macs=1000, bytes=4, launches=1), Cost(bytes=20, launches=3)
    found = floor("it", gpu, Work("op", "case", "ours", [product, copy]))
    assert found.seconds == pytest.approx(2 * 1000 / 1000 + 20 / 2 / 10)
    assert found.memory_share == pytest.approx(1 / 3)
    assert (found.macs, found.bytes, found.launches) == (1000, 12, 4)


def test_the_peaks_are_those_of_the_data_sheets():
    """In TFLOP/s of dense bfloat16 and TB/s."""
    found = {name: (gpu.flops / 1e12, gpu.bandwidth / 1e12) for name, gpu in GPUS.items()}
    assert found == {"A100": (312, 2.039), "H100": (989, 3.35), "B200": (2250, 8), "MI300X": (1307, 5.3)}


def test_nothing_is_predicted_without_the_library_whose_operators_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(native, "unavailable_reason", lambda: "it was not built")
    assert predict() == []
    with pytest.raises(SystemExit, match="1"):
        predictions.main([])
    assert "it was not built" in capsys.readouterr().err


@NEEDS_LIBRARY
def test_every_op_and_model_is_predicted_for_every_gpu(predicted):
    ops = {one.case for one in predicted if one.group == "op"}
    assert ops == {f"{op}, batch {BATCH}" for op in CASES}
    models = {(one.group, one.case.split(",")[0], one.contender) for one in predicted if one.group != "op"}
    assert len(models) == 2 * 2 * 3
    assert len(predicted) == len(GPUS) * (2 * len(CASES) + len(models))


@NEEDS_LIBRARY
def test_the_fast_models_floor_is_below_the_references(predicted):
    by_name = {(one.gpu, one.group, one.case, one.contender): one for one in predicted if one.group != "op"}
    for (*where, contender), fast in by_name.items():
        if contender == "fast":
            sdpa, plain = (by_name[(*where, f"reference, {kind}")] for kind in ("SDPA", "plain"))
            assert 1 < speedup_bound(sdpa, fast) < speedup_bound(plain, fast)
            assert fast.launches < sdpa.launches < plain.launches


@NEEDS_LIBRARY
def test_work_is_counted_at_its_batch(predicted):
    """Attention forward and backward: seven products of all queries with all keys."""
    ours = next(one for one in predicted if one.case == f"attention, batch {BATCH}" and one.contender == "ours")
    assert ours.macs == 7 * BATCH * 196**2 * 768
    tensor, sums = 2 * BATCH * 196 * 768, 2 * BATCH * 12 * 196  # bytes of bfloat16, log-sum-exps halved with the rest
    assert ours.bytes == (3 + 1) * tensor + sums + (1 + 3 + 1 + 3) * tensor + sums


@NEEDS_LIBRARY
def test_the_page_holds_what_the_command_prints(capsys):
    assert predictions.main(["--markdown"]) == 0
    assert capsys.readouterr().out in PAGE.read_text()


@NEEDS_LIBRARY
def test_both_tables_say_that_nothing_was_measured(predicted, monkeypatch, capsys):
    monkeypatch.setattr(predictions, "predict", lambda: predicted)
    assert predictions.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("computed from counts and published peaks; nothing was measured")
    assert "…" not in printed
    assert markdown(predicted).startswith("Computed from counts and published peaks; nothing was measured")

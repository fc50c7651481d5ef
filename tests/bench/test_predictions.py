"""The predictions for GPUs: floors from counts and peaks, never shown as measurements."""

from pathlib import Path

import pytest

from bench import predictions
from bench.op_cases import CASES
from bench.predictions import BATCH, GPU, GPUS, Work, floor, markdown, op_works, predict, speedup_bound
from bench.results import Prediction
from mmmae.cost.counting import Cost
from mmmae_kernels.cpu import library as native

PAGE = Path(__file__).parents[2] / "docs" / "gpus.md"
NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


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
def test_work_is_counted_at_its_batch():
    """Attention forward and backward: seven products of all queries with all keys."""
    work = next(work for work in op_works() if work.contender == "ours")
    ours = floor("H100", GPUS["H100"], work)
    assert ours.case == f"attention, batch {BATCH}"
    assert ours.macs == 7 * BATCH * 196**2 * 768
    tensor, sums = 2 * BATCH * 196 * 768, 2 * BATCH * 12 * 196  # bytes of bfloat16, log-sum-exps halved with the rest
    assert ours.bytes == (3 + 1) * tensor + sums + (1 + 3 + 1 + 3) * tensor + sums


@NEEDS_LIBRARY
def test_the_page_holds_every_op_and_model_with_the_fast_models_floor_below_the_references():
    """One test for all of this, as the predictions take a while."""
    predicted = predict()
    assert markdown(predicted) in PAGE.read_text()
    ops = {one.case for one in predicted if one.group == "op"}
    assert ops == {f"{op}, batch {BATCH}" for op in CASES}
    models = {(one.gpu, one.group, one.case, one.contender): one for one in predicted if one.group != "op"}
    assert len(models) == len(GPUS) * 2 * 2 * 3
    assert len(predicted) == len(GPUS) * 2 * len(CASES) + len(models)
    for (*where, contender), fast in models.items():
        if contender == "fast":
            sdpa, plain = (models[(*where, f"reference, {kind}")] for kind in ("SDPA", "plain"))
            assert 1 < speedup_bound(sdpa, fast) < speedup_bound(plain, fast)
            assert fast.launches < sdpa.launches < plain.launches


@pytest.mark.parametrize("option", [[], ["--markdown"]])
def test_a_table_says_that_nothing_was_measured(option, monkeypatch, capsys):
    case = "training step", "base, batch 64, all auxiliary images"
    predicted = [
        Prediction(gpu, *case, contender, 10**12, 10**10, 100, seconds, 0.25)
        for contender, seconds in (("reference, plain", 0.04), ("fast", 0.02))
        for gpu in GPUS
    ]
    monkeypatch.setattr(predictions, "predict", lambda: predicted)
    assert predictions.main(option) == 0
    printed = capsys.readouterr().out
    assert printed.lower().startswith("computed from counts and published peaks; nothing was measured")
    assert printed.count("40.00 (2.00x)") == len(GPUS)
    assert "…" not in printed

"""The predictions for GPUs: floors from counts and peaks, never shown as measurements."""

import importlib.util
from pathlib import Path

import pytest

from bench import predictions
from bench.op_cases import CASES
from bench.predictions import (
    BATCH,
    GPU,
    GPUS,
    GRAPH_GAP,
    HOST_LAUNCH,
    TASKS,
    Work,
    floor,
    markdown,
    op_works,
    predict,
    sections,
    speedup_bound,
    with_graph,
    without_graph,
)
from bench.results import Prediction
from mmmae.cost.costs import Cost, Operator

PAGE = Path(__file__).parents[2] / "docs" / "gpus.md"
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_a_floor_is_the_sum_of_what_bounds_each_operator():
    gpu = GPU(flops=1000.0, bandwidth=10.0)
    product, copy = Cost(macs=1000, bytes=4, launches=1), Cost(bytes=20, launches=3)
    work = Work("op", "case", "ours", [Operator("product", product), Operator("copy", copy, is_cast=True)])
    found = floor("it", gpu, work)
    assert found.seconds == pytest.approx(2 * 1000 / 1000 + 20 / 10)
    assert found.memory_share == pytest.approx(1 / 2)
    assert (found.macs, found.bytes, found.launches, found.casts) == (1000, 24, 4, 3)


def test_launches_take_the_gpu_a_pause_in_a_graph_and_the_host_a_call_without():
    few = Prediction("it", "training step", "case", "fast", 0, 0, launches=10, seconds=1.0, memory_share=1.0)
    many = Prediction("it", "training step", "case", "reference", 0, 0, 10**6, seconds=1.0, memory_share=1.0)
    assert (with_graph(few), without_graph(few)) == (1.0 + 10 * GRAPH_GAP, 1.0)
    assert (with_graph(many), without_graph(many)) == (1.0 + 10**6 * GRAPH_GAP, 10**6 * HOST_LAUNCH)
    assert speedup_bound(many, few) == 1
    assert speedup_bound(many, few, without_graph) == 10**6 * HOST_LAUNCH


def test_the_peaks_are_those_of_the_data_sheets():
    """In TFLOP/s of dense bfloat16 products summed in float32, and TB/s."""
    found = {name: (gpu.flops / 1e12, gpu.bandwidth / 1e12) for name, gpu in GPUS.items()}
    assert found == {
        "A100": (312, 2.039),
        "H100": (989, 3.35),
        "H200": (989, 4.8),
        "B200": (2250, 8),
        "MI300X": (1307, 5.3),
        "RTX 4090": (165.2, 1.008),
        "RTX 5090": (209.5, 1.792),
    }


def test_nothing_is_predicted_without_triton_whose_launches_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert predict() == []
    with pytest.raises(SystemExit, match="1"):
        predictions.main([])
    assert "Triton is not installed" in capsys.readouterr().err


@NEEDS_TRITON
def test_work_is_counted_at_its_batch_in_bfloat16():
    """Attention forward and backward: seven products of all queries with all keys."""
    work = next(work for work in op_works() if work.contender == "ours")
    ours = floor("H100", GPUS["H100"], work)
    assert ours.case == f"attention, batch {BATCH}"
    assert ours.macs == 7 * BATCH * 196**2 * 768
    tensor, sums = 2 * BATCH * 196 * 768, 4 * BATCH * 12 * 196  # bytes of bfloat16, and of float32 log-sum-exps
    assert ours.bytes == (3 + 1) * tensor + sums + (1 + 3 + 1 + 3) * tensor + sums


@NEEDS_TRITON
def test_the_page_holds_every_op_and_model_with_the_fast_models_floor_below_the_references():
    """One test for all of this, as the predictions take a while."""
    predicted = predict()
    assert markdown(predicted) in PAGE.read_text()
    ops = {one.case for one in predicted if one.group == "op"}
    assert ops == {f"{op}, batch {BATCH}" for op in CASES}
    models = {(one.gpu, one.group, one.case, one.contender): one for one in predicted if one.group != "op"}
    assert len(models) == len(GPUS) * sum(map(len, TASKS.values()))
    assert len(predicted) == len(GPUS) * 2 * len(CASES) + len(models)
    for (*where, contender), fast in models.items():
        if contender == "fast":
            sdpa = models[(*where, "reference, SDPA")]
            plain = models.get((*where, "reference, plain"), sdpa)
            assert 1 < speedup_bound(sdpa, fast) <= speedup_bound(plain, fast)
            assert fast.launches < sdpa.launches <= plain.launches
            assert fast.casts < sdpa.casts <= plain.casts


@pytest.mark.parametrize("option", [[], ["--markdown"]])
def test_the_tables_say_that_nothing_was_measured(option, monkeypatch, capsys):
    case = "training step", "base, batch 64, all auxiliary images"
    predicted = [
        Prediction(gpu, *case, contender, 10**12, 10**10, 0, seconds, 0.25)
        for contender, seconds in (("reference, plain", 0.04), ("fast", 0.02))
        for gpu in GPUS
    ]
    monkeypatch.setattr(predictions, "predict", lambda: predicted)
    assert predictions.main(option) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Computed from counts and published peaks; nothing was measured.")
    assert printed.count("40.0 (2.00x)") == 3 * len(GPUS)  # at the peaks, with a graph and without
    assert "…" not in printed


def test_a_table_has_no_more_columns_than_a_page_shows():
    one = [Prediction(gpu, group, "case", "fast", 1, 1, 1, 1.0, 1.0) for gpu in GPUS for group in ("op", "encoding")]
    found = sections(one)
    assert len(found) == 5
    assert all(len(row) in (1, len(section.heads)) for section in found for row in section.rows)
    assert max(len(section.heads) for section in found) <= 8

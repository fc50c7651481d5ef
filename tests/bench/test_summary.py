"""The tables of a kept run in README.md and docs/performance.md are those that `python -m bench.summary` prints."""

import re
from pathlib import Path

import pytest

from bench.results import FOLDER, Measurement, Results
from bench.summary import long, main, short

ROOT = Path(__file__).parents[2]
COMMAND = r"python -m bench\.summary (?:--long )?bench/runs/(\S+\.json)"


@pytest.mark.parametrize(("page", "table"), [("README.md", short), ("docs/performance.md", long)])
def test_a_page_shows_the_run_that_it_names(page, table):
    text = (ROOT / page).read_text()
    (name,) = re.findall(COMMAND, text)
    assert table(Results.from_json((FOLDER / name).read_text())) in text


@pytest.fixture
def results():
    machine = {"cpu": "a CPU", "threads": 2}
    measurements = [
        Measurement("encoding", "base, batch 4", "fast", [1.0], peak_bytes=10),
        Measurement("training step", "base, batch 4", "reference, SDPA", [4.0, 4.4, 4.2], True, peak_bytes=1500),
        Measurement("training step", "base, batch 4", "reference, plain", [6.0], peak_bytes=2000),
        Measurement("training step", "base, batch 4", "fast", [2.9, 3.0, 3.1], peak_bytes=1000),
        Measurement("training step", "base, batch 4", "fast, compiled", [3.3]),
        Measurement("training step", "base, batch 4", "fast", [3.0], allocator="kept"),
        Measurement("training step", "base, batch 4, all auxiliary images", "fast", [4.0]),
        Measurement("encoding", "base, batch 4, image_size 112", "fast", [0.5]),
        Measurement("batch", "base, batch 1", "fast", [1.0], x=1.0),
        Measurement("activation checkpointing", "base, batch 4, activation_checkpointing False", "fast", [3.5]),
        Measurement("activation checkpointing", "base, batch 4, activation_checkpointing True", "fast", [5.0]),
        Measurement("op", "patchify, batch 8", "index the view", [0.003], True),
        Measurement("op", "patchify, batch 8", "native", [0.001]),
        Measurement("op", "patchify, batch 8", "index the view, compiled", [0.0015]),
    ]
    limits = {"copy_gb_s": 30.4, "gemm_gflop_s": 218.2}
    return Results("2026-01-02T03:04:05+00:00", "abc", machine, {"torch": "2"}, {}, limits, measurements)


PLACE = "2026-01-02, commit abc: a CPU, 2 threads; torch 2; a copy 30 GB/s, a matrix product 218 GFLOP/s."


def with_spaces(text):
    """Return the lines of a table; numbers and their units have no-break spaces between them."""
    assert "3.00\N{NO-BREAK SPACE}s" in text
    return text.replace("\N{NO-BREAK SPACE}", " ").splitlines()


def test_the_short_table_has_one_row_a_workload_with_what_others_take_over_what_the_fast_model_takes(results):
    assert with_spaces(short(results)) == [
        "| batch 4, float32 | fast | plain | SDPA | SDPA, compiled | ViTMAE | VideoMAE |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| training step, `base` | 3.00 s | 2.00 x | 1.40 x |  |  |  |",
        "| training step, `base`, all auxiliary images | 4.00 s |  |  |  |  |  |",
        "| encoding, `base` | 1.00 s |  |  |  |  |  |",
        "",
        PLACE,
    ]


def test_the_long_table_has_memory_every_case_once_and_compiled_baselines(results):
    lines = with_spaces(long(results))
    assert lines[2:12] == [
        "| encoding, `base` | 1.00 s |  |  |  |  |  |  |",
        "| training step, `base` | 3.00 s | 2.00 x | 1.40 x |  |  |  | 1.10 x |",
        "| … peak memory | 0.00 GB | 2.00 x | 1.50 x |  |  |  |  |",
        "| training step, `base`, all keep freed memory | 3.00 s |  |  |  |  |  |  |",
        "| training step, `base`, all auxiliary images | 4.00 s |  |  |  |  |  |  |",
        "| encoding, `base`, 196 tokens | 0.50 s |  |  |  |  |  |  |",
        "| training step, `base`, activation checkpointing | 5.00 s |  |  |  |  |  |  |",
        "",
        "| batch 8, forward and backward | in PyTorch | ours | PyTorch | PyTorch, compiled |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    assert lines[12:] == ["| `patchify` | index the view | 1.00 ms | 3.00 x | 1.50 x |", "", PLACE]


def test_cases_in_bfloat16_are_a_table_of_their_own_beside_float32(results):
    title = "base, batch 4, bfloat16"
    half = {"dtype": "bfloat16"}
    results.measurements += [
        Measurement("training step", title, "reference, SDPA", [1.3], True, **half),
        Measurement("training step", title, "reference, SDPA, compiled", [1.2], **half),
        Measurement("training step", title, "ViTMAE, SDPA", [1.5], **half),
        Measurement("training step", title, "fast", [1.0], saved_bytes=10**9, **half),
        Measurement("training step", title, "reference, SDPA, float32", [4.0]),
        Measurement("training step", title, "fast, float32", [3.0], saved_bytes=2 * 10**9),
        Measurement("op", "patchify, batch 8, bfloat16", "index the view", [0.002], True, **half),
        Measurement("op", "patchify, batch 8, bfloat16", "native", [0.001], **half),
    ]
    lines = with_spaces(short(results))
    table = [
        "| batch 4, bfloat16 | fast | SDPA | SDPA, compiled | ViTMAE | VideoMAE | fast, float32 | SDPA, float32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| training step, `base` | 1.00 s | 1.30 x | 1.20 x | 1.50 x |  | 3.00 x | 4.00 x |",
    ]
    assert lines[0].startswith("| batch 4, float32 |")
    assert lines[5:] == ["", *table, "", PLACE]
    lines = with_spaces(long(results))
    assert lines[10:14] == [*table, "| … saved for backward | 1.00 GB |  |  |  |  | 2.00 x |  |"]
    assert lines[15].startswith("| batch 8, forward and backward | in PyTorch")
    assert lines[19].startswith("| batch 8, bfloat16, forward and backward | in PyTorch")
    assert lines[21] == "| `patchify` | index the view | 1.00 ms | 2.00 x |  |"


def test_a_run_without_models_or_ops_has_no_table(results):
    results.measurements = []
    assert short(results) == long(results) == PLACE + "\n"


def test_a_file_that_holds_something_else_is_named(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(SystemExit) as error:
        main([str(file)])
    assert error.value.code == 1
    assert "other.json: not a results file of the bench suite" in capsys.readouterr().err

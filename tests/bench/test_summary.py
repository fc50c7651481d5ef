"""The README's table of a run is that of the run kept beside it."""

import re
from pathlib import Path

import pytest

from bench.results import FOLDER, Measurement, Results
from bench.summary import main, markdown

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readme_shows_the_run_that_it_names():
    (name,) = re.findall(r"python -m bench\.summary bench/runs/(\S+\.json)", README)
    assert markdown(Results.from_json((FOLDER / name).read_text())) in README


@pytest.fixture
def results():
    machine = {"cpu": "a CPU", "threads": 2}
    measurements = [
        Measurement("training step", "base, batch 4", "reference, SDPA", [4.0, 4.4, 4.2], True, peak_bytes=1500),
        Measurement("training step", "base, batch 4", "reference, plain", [6.0], peak_bytes=2000),
        Measurement("training step", "base, batch 4", "fast", [2.9, 3.0, 3.1], peak_bytes=1000),
        Measurement("training step", "base, batch 4", "fast", [3.0], allocator="kept"),
        Measurement("batch", "base, batch 1", "fast", [1.0], x=1.0),
        Measurement("op", "patchify, batch 8", "native", [1.0]),
    ]
    limits = {"copy_gb_s": 30.4, "gemm_gflop_s": 218.2}
    return Results("2026-01-02T03:04:05+00:00", "abc", machine, {"torch": "2"}, {}, limits, measurements)


def test_a_row_holds_what_others_take_over_what_the_fast_model_takes(results):
    lines = markdown(results).splitlines()
    assert lines[2] == "| training step: base, batch 4 | 3.00 s | 2.00 x | 1.40 x |  |  |  |"
    assert lines[3] == "| … peak memory | 0.00 GB | 2.00 x | 1.50 x |  |  |  |"
    assert lines[4] == "| training step: base, batch 4, all keep freed memory | 3.00 s |  |  |  |  |  |"
    place = "a CPU, 2 threads; torch 2; a copy 30 GB/s, a matrix product 218 GFLOP/s."
    assert lines[5:] == ["", f"2026-01-02, commit abc: {place}"]


def test_a_file_that_is_none_is_named(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(SystemExit) as error:
        main([str(file)])
    assert error.value.code == 1
    assert "other.json: no results of the bench suite" in capsys.readouterr().err

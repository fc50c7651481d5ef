"""The bench suite as a user runs it, whole and with something broken on purpose: it says so each time."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import op_race
from bench.compare import main as compare
from bench.contenders import Task
from bench.options import Options
from bench.race import BASELINE, Entry, Runner, race
from bench.results import Measurement, Results
from mmmae_kernels import explain

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(explain("gelu_linear")["native"] != "serves", reason="needs the native library")


def suite(broken, *arguments):
    """Run a part of the suite in a process of its own; its exit status and output."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.bench.broken_suite", "-q", *map(str, arguments)]
    environment = {**os.environ, "BROKEN": broken, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


def timed(folder):
    (file,) = folder.glob("*.json")
    return {one["contender"] for one in json.loads(file.read_text())["measurements"]}


@needs_native
def test_a_run_leaves_results_and_a_page(tmp_path):
    status, output = suite(
        "nothing", "bench/test_ops.py", "--benchmark", "--quick", "--only", "gelu_linear", "--results", tmp_path
    )
    assert status == 0, output
    assert "gelu_linear: every variant in turn" in output  # progress
    assert timed(tmp_path) == {"F.gelu, F.linear", "native", "eager"}
    (page,) = tmp_path.glob("*.html")
    assert "gelu_linear" in page.read_text()


@needs_native
def test_an_op_that_is_off_by_a_hundredth_fails_and_is_not_timed(tmp_path):
    status, output = suite(
        "op", "bench/test_ops.py", "--benchmark", "--quick", "--only", "gelu_linear", "--results", tmp_path
    )
    assert status == 1
    assert "gelu_linear: native: output 0 is off by 1.0e-02, expected at most 1.0e-05, so it is not timed" in output
    assert timed(tmp_path) == {"F.gelu, F.linear", "eager"}


@needs_native
def test_a_formula_that_is_off_by_two_fails():
    status, output = suite("formula", "bench/test_counts.py", "-k", "formula or agree")
    assert status == 1
    assert "test_the_formula_of_an_op_gives_what_its_pytorch_code_is_counted_to_have[attention]" in output
    assert "test_the_two_counters_and_the_closed_form_agree[base]" in output


def test_a_variant_that_does_not_compile_fails_alone(monkeypatch, tmp_path):
    def broken(run):
        def fail():
            raise RuntimeError("it does not compile")

        return fail

    monkeypatch.setattr(op_race, "compiled", broken)
    options = Options(True, True, True, None, batch=1, device="cpu", dtype="float32", only=None, results=tmp_path)
    race = op_race.OpRace("patchify", options)
    race.run(rounds=1)
    assert race.complaint("index the view, compiled") == "RuntimeError: it does not compile"
    assert race.complaint("index the view") == ""
    assert {"index the view", "eager"} <= race.seconds.keys()
    assert "index the view, compiled" not in race.seconds


def test_times_are_taken_only_when_asked_for():
    status, output = suite("nothing", "bench/test_ops.py", "--only", "gelu_linear", "-rs")
    assert status == 0
    assert "times are taken with --benchmark" in output


def test_a_wrong_option_is_refused_before_any_work():
    complaints = {
        ("--only", "gleu_linear"): "--only is 'gleu_linear', must be one of attention, ",
        ("--batch", "0"): "argument --batch: invalid",
        ("--device", "tpu"): "argument --device: invalid choice: 'tpu'",
        ("--results", __file__): "test_bench_suite.py, which is no folder",
    }
    with ThreadPoolExecutor() as pool:  # they wait for their imports
        answers = pool.map(lambda option: suite("nothing", "bench/", "--benchmark", *option), complaints)
        for (status, output), complaint in zip(answers, complaints.values(), strict=True):
            assert status == 4
            assert complaint in output


def test_a_sleep_in_the_fast_path_is_a_regression(tmp_path, monkeypatch, capsys):
    """Against a stored run: nothing else tells a slow machine from slow code."""
    task = Task("training step", "tiny", batch=2)
    entries = [Entry(BASELINE, task), Entry("fast", task, kept=True)]
    files = {}
    for kind in ("nothing", "slow"):
        monkeypatch.setattr(Runner, "module", "tests.bench.broken_worker")
        monkeypatch.setenv("BROKEN", kind)
        found = race(entries, 3, exact=False, tell=lambda text: None)
        measurements = [
            Measurement(task.kind, task.title, entry.contender, found[entry].seconds, entry.contender == BASELINE)
            for entry in entries
        ]
        results = Results("2026-01-01T00:00:00+00:00", "", {"name": "here"}, {}, {}, {}, measurements)
        files[kind] = tmp_path / f"{kind}.json"
        files[kind].write_text(results.to_json())
    assert compare([str(files["nothing"]), str(files["nothing"])]) == 0
    assert compare([str(files["nothing"]), str(files["slow"])]) == 1
    assert "fast" in capsys.readouterr().out

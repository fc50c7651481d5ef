"""The bench suite as a user runs it, well and with something broken on purpose: it says so each time."""

import json
from pathlib import Path

import pytest
import torch

import bench.suite
from bench import op_race
from bench.op_race import OpRace
from bench.options import Options
from mmmae.cost import mac_formulas
from mmmae_kernels import explain
from mmmae_kernels.operators import kernels_for

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(explain("gelu_linear")["native"] != "serves", reason="needs the native library")


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a part of the suite in this process, and returns exit status and output."""
    monkeypatch.setattr(bench.suite, "measure_speeds", lambda device, dtype: {"copy": 1e10, "gemm": 1e11})

    def run(part, *options):
        arguments = ["-p", "no:cacheprovider", "-q", "--capture=sys", ROOT / "bench" / part, *options]
        status = pytest.main([*map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


@pytest.fixture
def time_gelu(run, tmp_path):
    """A function that times one op, and returns exit status, output, and the names of what was timed."""

    def time_it():
        options = ("--benchmark", "--quick", "--only", "gelu_linear", "--results", tmp_path)
        status, output = run("test_ops.py", *options)
        (file,) = tmp_path.glob("*.json")
        return status, output, {one["contender"] for one in json.loads(file.read_text())["measurements"]}

    return time_it


@needs_native
def test_a_run_leaves_results_and_a_page(time_gelu, tmp_path):
    status, output, timed = time_gelu()
    assert status == 0, output
    assert "gelu_linear in float32: every variant in turn" in output  # progress
    assert timed == {"F.gelu, F.linear", "native", "eager"}
    (page,) = tmp_path.glob("*.html")
    assert "gelu_linear" in page.read_text()


@needs_native
def test_an_op_that_is_off_by_a_hundredth_fails_and_is_not_timed(time_gelu, monkeypatch):
    kernels = kernels_for(torch.empty(0), "native")
    right = kernels.gelu_forward
    monkeypatch.setattr(kernels, "gelu_forward", lambda *args: (1.01 * right(*args)[0], None))
    status, output, timed = time_gelu()
    assert status == 1
    assert "gelu_linear: native: output 0 is off by 1.0e-02, expected at most 1.0e-05, so it is not timed" in output
    assert timed == {"F.gelu, F.linear", "eager"}


@needs_native
def test_a_formula_that_is_off_by_two_fails(run, monkeypatch):
    right = mac_formulas.MAC_FORMULAS["mmmae::attention"]
    monkeypatch.setitem(mac_formulas.MAC_FORMULAS, "mmmae::attention", lambda *shapes: 2 * right(*shapes))
    counts = "test_counts.py::test_the_two_counters_and_the_closed_form_agree[tiny]"
    formula = "test_counts.py::test_the_formula_of_an_op_gives_what_its_pytorch_code_is_counted_to_have[attention]"
    for test in (counts, formula):
        status, output = run(test)
        assert status == 1
        assert f"/{test}" in output


def test_a_variant_that_does_not_compile_fails_alone(monkeypatch, tmp_path):
    def broken(run):
        def fail():
            raise RuntimeError("it does not compile")

        return fail

    monkeypatch.setattr(op_race, "compiled", broken)
    options = Options(True, True, True, None, batch=1, device="cpu", dtype="float32", only=None, results=tmp_path)
    race = OpRace("patchify", options)
    race.run(rounds=1)
    assert race.complaint("index the view, compiled") == "RuntimeError: it does not compile"
    assert race.complaint("index the view") == ""
    assert {"index the view", "eager"} <= race.seconds.keys()
    assert "index the view, compiled" not in race.seconds


def test_half_precision_is_held_against_float32(tmp_path):
    """An error may be twice that of the same work in plain PyTorch."""
    options = Options(True, True, False, None, batch=1, device="cpu", dtype="bfloat16", only=None, results=tmp_path)
    race = OpRace("masked_l2_loss", options)
    assert 1e-4 < race.allowed < 0.1
    assert race.complaint("eager") == ""


def test_times_are_taken_only_when_asked_for(run):
    status, output = run("test_ops.py", "--only", "gelu_linear", "-rs")
    assert status == 0
    assert "times are taken with --benchmark" in output


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (("--only", "gleu_linear"), "--only is 'gleu_linear', must be one of attention, "),
        (("--batch", "0"), "argument --batch: invalid"),
        (("--device", "tpu"), "argument --device: invalid choice: 'tpu'"),
        (("--results", __file__), "test_suite.py, which is not a folder"),
        (("-n", "2"), "--benchmark times one measurement after another; run it without -n and --dist"),
    ],
)
def test_a_wrong_option_is_refused_before_any_work(run, option, complaint):
    status, output = run("", "--benchmark", *option)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert complaint in output

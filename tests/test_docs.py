"""Every block of the pages runs, in order, in an empty folder: they are taken from the pages, not copied."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmmae
from mmmae.cli import main
from mmmae.cost.counting import count_step

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page.name for page in (ROOT / "docs").glob("*.md") if "```" in page.read_text())
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SECONDS = 120


def commands(text):
    """The command lines of a block; a backslash at the end of a line continues it."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def run(line, folder):
    program, *arguments = shlex.split(line)
    if program == "mmmae":
        assert main(arguments) == 0, line
    elif program == "torchrun":
        torchrun(arguments, folder)
    else:
        raise AssertionError(f"no rule how to run {line!r}")


def torchrun(arguments, folder):
    """Run it, on each of the machines that it names: here they are processes of one."""
    nodes = int(arguments[arguments.index("--nnodes") + 1]) if "--nnodes" in arguments else 1
    meeting = [] if nodes > 1 else ["--standalone"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    machines = [subprocess.Popen(command, cwd=folder, env=environment, **pipes) for _ in range(nodes)]
    for machine in machines:
        printed, _ = machine.communicate(timeout=SECONDS)
        assert machine.returncode == 0, printed


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, text in BLOCK.findall((ROOT / "docs" / page).read_text()):
        if language == "python":
            exec(compile(text, page, "exec"), names)
        elif language == "sh":
            for line in commands(text):
                run(line, tmp_path)
        else:
            raise AssertionError(f"{page} has a block in {language or 'no language'}, expected python or sh")


def test_the_memory_of_the_troubleshooting_page_is_what_is_counted():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    stated = dict(
        re.findall(r"^\| `?(as it is|--set [a-z_]+=[a-z0-9.]+|the last two together)`? \| ([0-9.]+) \|", page, re.M)
    )
    few, recomputed = {"decode_fraction": 0.25}, {"activation_checkpointing": True}
    expected = {
        "as it is": {},
        "--set decode_fraction=0.5": {"decode_fraction": 0.5},
        "--set decode_fraction=0.25": few,
        "--set activation_checkpointing=true": recomputed,
        "the last two together": few | recomputed,
    }
    assert stated.keys() == expected.keys()
    for switch, fields in expected.items():
        with torch.device("meta"):
            model = mmmae.FastModel(mmmae.MMMAEConfig.preset("base", **fields))
        assert float(stated[switch]) == pytest.approx(count_step(model.train(), 1).saved_bytes / 1e6, abs=0.05), switch


TYPED = re.compile(r"^    ((?:\.venv/bin/|make |mmmae |python |pip |git |torchrun ).*)$", re.MULTILINE)
TYPED_ON = [
    (page.relative_to(ROOT).as_posix(), line.split("  #")[0].strip())
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    for line in TYPED.findall(page.read_text())
]
RESULT = ROOT / "bench" / "runs" / "20261124-172329-amd-epyc-2-cores.json"
# What stands for a file or folder of the reader's.
STANDS_FOR = {
    "DIR": "eyes/hsi",
    "LABELS": "eyes/labels",
    "OLD.json": "result.json",
    "NEW.json": "result.json",
    "FILE.json": "result.json",
}
# Takes long, and is run by test_bench_predictions.py, kernels/test_aot.py, soak/test_land_cover_runs.py.
RUN_ELSEWHERE = ("bench.predictions", "mmmae_kernels.aot", "experiments/")
SHORT = ["--steps", "2", "--batch", "1", "--warmup", "0"]


@pytest.mark.parametrize(("page", "line"), TYPED_ON, ids=str)
def test_a_line_that_a_page_says_to_type_can_be_typed(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, stand_in in STANDS_FOR.items():
        line = re.sub(rf"\b{re.escape(name)}\b", stand_in, line)
    program, *arguments = shlex.split(line.removeprefix(".venv/bin/"))
    if arguments[:1] == ["pretrain"]:
        arguments += SHORT
    elif arguments[:1] == ["finetune"]:
        arguments += ["--epochs", "1"]
    elif arguments[:2] == ["-m", "pytest"]:
        arguments += ["--collect-only", "-q"]
    elif any(name in line for name in RUN_ELSEWHERE):
        arguments += ["--help"]
    if program == "git":
        pytest.skip("needs the address of the repository")
    elif program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        (extra,) = re.findall(r"\[(\w+)\]", line)
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    elif program == "mmmae":
        if "eyes/hsi" in line:
            assert main(["data", "phantom", "eyes", "--subjects", "3", "--size", "64"]) == 0
        if "--encoder" in arguments:
            assert main(["pretrain", "--preset", "tiny", "--hsi", "eyes/hsi", *SHORT]) == 0
        assert main(arguments) == 0
    else:
        shutil.copy(RESULT, tmp_path / "result.json")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        folder = tmp_path if "result.json" in line else ROOT
        subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, capture_output=True)

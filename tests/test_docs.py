"""The documentation runs: each block and each line to type, taken from README.md and the pages, in an empty folder.

Runs leave out the work that takes most of their time; tests/cli/test_cli.py does one whole.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import mmmae
from bench.chart import lowest_ratios
from bench.results import FOLDER, Results
from mmmae.cli import main
from mmmae.cost.counting import count_step

pytestmark = pytest.mark.usefixtures("quick_runs")
ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted(page.name for page in (ROOT / "docs").glob("*.md") if "```" in page.read_text())
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def commands(text):
    """Return the command lines of a block without comments; a backslash at the end of a line continues it."""
    lines = [line.split("  #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run(line, folder):
    """Run a command line of a page."""
    program, *arguments = shlex.split(line)
    if program == "mmmae":
        assert main(arguments) == 0, line
    elif program == "torchrun":
        torchrun(arguments, folder)
    else:
        raise AssertionError(f"{line!r} starts {program!r}, expected mmmae or torchrun")


def torchrun(arguments, folder):
    """Run a command under torchrun.

    Machines are processes here. Of one machine the options are read, and this process runs the command alone:
    test_torchrun.py starts two.
    """
    options = get_args_parser().parse_args(arguments)
    nodes = int(options.nnodes.split(":")[-1])
    if nodes == 1:
        assert (options.module, options.training_script) == (True, "mmmae")
        assert main(options.training_script_args) == 0, arguments
        return
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    program = len(command) - len(options.training_script_args) - 1
    assert command[program - 1 : program + 1] == ["-m", "mmmae"]
    command[program] = "tests.training.quick_runs"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    machines = [subprocess.Popen(command, cwd=folder, env=environment, **pipes) for _ in range(nodes)]
    for machine in machines:
        printed, _ = machine.communicate()
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
        elif language != "mermaid":
            raise AssertionError(f"{page} has a block in {language or 'no language'}, expected python, sh or mermaid")


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, text in BLOCK.findall(README.read_text()):
        if language == "python":
            exec(compile(text, "README.md", "exec"), names)
    assert names["tokens"].shape == (2, 784, 768)
    assert names["visible"].shape == (2, 196, 768)


def test_no_block_of_the_readme_scrolls_sideways():
    lines = [line for _, text in BLOCK.findall(README.read_text()) for line in text.splitlines()]
    assert [line for line in lines if len(line) > 95] == []


def test_the_readme_tells_the_ratios_of_its_chart():
    runs = [Results.from_json(path.read_text()) for path in sorted(FOLDER.glob("20261124-*.json"))]
    ratios = {name: f"{ratio:.2f}" for name, ratio in lowest_ratios(runs).items()}
    (told,) = re.findall(r"!\[(.*)\]\(docs/speed\.svg\)", README.read_text())
    shown = [ratios[name] for name in ("fast", "reference, SDPA", "reference, plain")]
    assert re.findall(r"\d\.\d\d", told) == shown


def test_the_cells_of_the_notebook_run_in_order_and_their_outputs_are_kept(with_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = ROOT / "examples" / "quickstart.ipynb"
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert file.stat().st_size < 100_000
    source = "\n".join("".join(cell["source"]) for cell in cells)
    assert "steps=150" in source
    exec(compile(source.replace("steps=150", "steps=2"), file.name, "exec"), names := {})
    assert names["places"].shape == (24, 64, 64)
    assert names["found"].shape == (6, 64)


PATH_OF_A_MACHINE = re.compile(r"(?<![\w.~/-])/(?:tmp|root|home|work|Users)/[\w.]+")


def test_no_page_output_or_kept_run_shows_a_path_of_one_machine():
    pages = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    pages += [*(ROOT / "docs").glob("*.svg"), *(ROOT / "examples").glob("*.ipynb"), *FOLDER.glob("*.json")]
    found = {page.name: PATH_OF_A_MACHINE.findall(page.read_text()) for page in pages}
    assert {name: paths for name, paths in found.items() if paths} == {}
    assert PATH_OF_A_MACHINE.search("PairedFolder(/tmp/tmp_1/hsi: 24 subjects)")


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


def typed_lines(page):
    """Return the lines that a page says to type: those that are indented, and in README.md the blocks of a shell."""
    text = page.read_text()
    shell = [part for language, part in BLOCK.findall(text) if language == "sh" and page == README]
    indented = TYPED.findall(BLOCK.sub("", text))
    return [*commands("\n".join(indented)), *(line for part in shell for line in commands(part))]


TYPED_ON = [
    (page.relative_to(ROOT).as_posix(), line)
    for page in (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    for line in typed_lines(page)
]
RESULT = FOLDER / "20261124-172329-amd-epyc-2-cores.json"
# What stands for a file or folder of the reader's.
STANDS_FOR = {
    "DIR": "eyes/hsi",
    "LABELS": "eyes/labels",
    "OLD.json": "result.json",
    "NEW.json": "result.json",
    "FILE.json": "result.json",
}
# Takes long, and is run by bench/test_predictions.py, kernels/test_aot.py, and for experiments by soak/.
RUN_ELSEWHERE = ("bench.predictions", "mmmae_kernels.aot", "experiments/")
CHANGE_THE_PROCESS = ("bench.host_time", "bench/where.py")
# Each pass once: bench/test_host_time.py runs the command as it is.
HOST_TIME = "import bench.host_time as it; it.SWEEPS = it.ROUNDS = it.SETTLING = 1; it.main([])"
SHORT = ["--steps", "2", "--batch", "1", "--warmup", "0"]
SMALL = [f"--set={field}=1" for field in ("depth", "aux_depth", "decoder_depth")] + ["--set=image_size=64"]


@pytest.mark.parametrize(("page", "line"), TYPED_ON, ids=str)
def test_a_line_that_a_page_says_to_type_can_be_typed(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, stand_in in STANDS_FOR.items():
        line = re.sub(rf"\b{re.escape(name)}\b", stand_in, line)
    program, *arguments = shlex.split(line.removeprefix(".venv/bin/"))
    if arguments[:1] == ["pretrain"]:
        arguments += SHORT + SMALL
    elif arguments[:1] == ["finetune"]:
        arguments += ["--epochs", "1"]
    elif arguments == ["profile", "base"]:
        arguments = ["profile", "tiny"]
    elif arguments == ["-m", "bench.host_time"]:
        arguments = ["-c", HOST_TIME]
    elif arguments[:2] == ["-m", "pytest"]:
        arguments += ["--collect-only", "-q", "--capture=sys", "-p", "no:cacheprovider"]
    elif any(name in line for name in RUN_ELSEWHERE):
        arguments += ["--help"]
    if program == "git":
        pytest.skip("needs the address of the repository")
    elif program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        assert re.fullmatch(r"pip install (\.|mmmae)(\[\w+\])?", " ".join([program, *arguments]))
        for extra in re.findall(r"\[(\w+)\]", line):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    elif program == "mmmae":
        if "eyes/hsi" in line:
            assert main(["data", "phantom", "eyes", "--subjects", "3", "--size", "64"]) == 0
        if "--encoder" in arguments:
            run = str(Path(arguments[arguments.index("--encoder") + 1]).parent)
            assert main(["pretrain", "--preset", "tiny", "--hsi", "eyes/hsi", "--out", run, *SHORT, *SMALL]) == 0
        if arguments[0] == "predict":
            run = str(Path(arguments[arguments.index("--model") + 1]).parent)
            scratch = ["--scratch", "--preset", "tiny", *SMALL, "--task", "segmentation", "--epochs", "1"]
            assert main(["finetune", *scratch, "--hsi", "eyes/hsi", "--labels", "eyes/labels", "--out", run]) == 0
        assert main(arguments) == 0
    elif any(name in line for name in CHANGE_THE_PROCESS):
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    else:
        shutil.copy(RESULT, tmp_path / "result.json")
        monkeypatch.chdir(tmp_path if "result.json" in line else ROOT)
        run_python(arguments, monkeypatch)


def run_python(arguments, monkeypatch):
    """Run a module or a script in this process, which has imported most of what it needs."""
    is_module = arguments[0] == "-m"
    name, *rest = arguments[is_module:]
    monkeypatch.setattr(sys, "argv", [name, *rest])
    if not is_module:
        monkeypatch.syspath_prepend(Path(name).resolve().parent)  # whose other modules a script may import
    status = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules")
        try:
            (runpy.run_module if is_module else runpy.run_path)(name, run_name="__main__")
        except SystemExit as end:
            status = end.code
    assert not status

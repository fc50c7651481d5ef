"""What each part imports: the kernel library PyTorch alone, the model a bare install, commands also their extras."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

import mmmae
from mmmae.extras import EXTRAS

pytestmark = pytest.mark.xdist_group("imports")  # whose processes are started once
BLOCK = "import sys; sys.modules.update(dict.fromkeys({absent!r}))  # as if not installed\n"
OPTIONAL = {
    *(package for packages in EXTRAS.values() for package in packages),
    *("transformers", "accelerate", "peft", "timm", "torchgeo", "terratorch", "sklearn", "flash_attn", "xformers"),
}


def run(code: str) -> str:
    """Run Python code in a process of its own and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# In one process, as each import of torch takes seconds: what the packages load, then torch's counter, imported later.
LOADED = """
import json, sys, torch
before = set(sys.modules)
import mmmae_kernels
by_kernels = sorted(set(sys.modules) - before)
import mmmae
by_model = sorted(sys.modules)
"""
START = """
import torch, mmmae_kernels
backend = "native" if mmmae_kernels.explain("attention")["native"] == "serves" else "eager"
"""
COUNTER = "from torch.utils.flop_counter import FlopCounterMode\n"
COUNT = """
q = torch.randn(2, 5, 3, 2, 8)
with FlopCounterMode(display=False) as counter:
    mmmae_kernels.attention(q, backend=backend)
counted = counter.get_total_flops()
"""


@pytest.fixture(scope="module")
def plain():
    """Return what a process that has everything finds: modules by import, and the operations of a call of attention."""
    code = LOADED + START + COUNTER + COUNT + "print(json.dumps([by_kernels, by_model, counted]))"
    return dict(zip(("by kernels", "by model", "counted"), json.loads(run(code)), strict=True))


def test_the_kernel_library_imports_nothing_but_torch_and_not_its_compiler(plain):
    added = set(plain["by kernels"])
    foreign = {name for name in added if name.split(".")[0] not in {*sys.stdlib_module_names, "mmmae_kernels"}}
    assert "mmmae_kernels" in added
    assert foreign == set()
    assert "torch._dynamo" not in added


def test_the_model_does_not_load_what_only_some_calls_need(plain):
    """These take several times as long to import as the package itself."""
    added = set(plain["by model"])
    assert "mmmae" in added
    assert added.isdisjoint(
        {"torch._dynamo", "sympy", "torch.distributed.tensor", "lightning", "rasterio", "matplotlib"}
    )


def test_the_kernel_library_works_with_torch_alone():
    absent = {*OPTIONAL, "triton", "numpy", "safetensors", "huggingface_hub", "mmmae"}
    code = """
import warnings; warnings.simplefilter("ignore")  # torch's, of numpy
import torch, mmmae_kernels
x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.ones(8)
total, norm = mmmae_kernels.add_layer_norm(x, x, weight, weight)
norm.sum().backward()
mmmae_kernels.attention(torch.randn(1, 4, 3, 2, 8))
mask = mmmae_kernels.random_masking(2, 16, 4, seed=0)
print(mmmae_kernels.explain("add_layer_norm")["triton"])
"""
    assert run(BLOCK.format(absent=absent) + code).strip() == "triton is not installed"


def test_torchs_counter_knows_the_operators_whenever_it_is_imported(plain):
    assert "torch.utils.flop_counter" not in plain["by model"]  # it is imported later
    expected = 2 * 2 * 2 * 5 * 5 * 2 * 8  # scores and mix, two operations a multiply-add
    assert int(run(COUNTER + START + COUNT + "print(counted)")) == plain["counted"] == expected


COMMANDS = """
import contextlib, io, json
from mmmae.cli import main
answers = {{}}
for line in {lines!r}:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = main(line.split())
        except SystemExit as exit:  # argparse, after --help
            status = exit.code
    answers[line] = [status, out.getvalue(), errors.getvalue()]
"""
TRAINS = """
import torch, mmmae
model = mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), aux_patch=16)
model(torch.randn(2, 1, 12, 32, 32), seed=0).loss.backward()
tokens = model.hsi_encoder()(torch.randn(1, 1, 12, 32, 32)).shape[1]
macs = mmmae.profile("tiny").encoder.total.macs
"""
WORK = ("--help", "pretrain --help", "profile tiny")  # by a bare install
NEEDS = {  # command line -> extra that it needs
    "pretrain": "train",
    "finetune --encoder e --hsi h --task segmentation --labels l": "train",
    "encode --encoder e --hsi h --out o.npz": "train",
    "reconstruct --model m --hsi h --out o": "train",
    "info": "train",
    "import c.pth --out o": "train",
    "import-spectralgpt c.pth --out o": "train",
    "data phantom o": "data",
}


@pytest.fixture(scope="module")
def bare():
    """Return what a process of a bare install finds: tokens and multiply-adds of a model, and answers to commands."""
    code = TRAINS + COMMANDS.format(lines=[*WORK, *NEEDS]) + "print(json.dumps([tokens, macs, answers]))"
    found = json.loads(run(BLOCK.format(absent=OPTIONAL) + code))
    return dict(zip(("tokens", "macs", "answers"), found, strict=True))


def test_a_model_trains_and_is_profiled_by_a_bare_install(bare, monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore", None)  # whose counter gives the same or raises: tests/cost
    assert (bare["tokens"], bare["macs"]) == (64, mmmae.profile("tiny").encoder.total.macs)


def test_by_a_bare_install_each_command_works_or_names_the_extra_that_it_needs(bare):
    for line in WORK:
        status, out, _ = bare["answers"][line]
        assert (status, bool(out)) == (0, True), line
    by_torch_alone = "counted by PyTorch alone; fvcore checks it: pip install 'mmmae[profile]'\n"
    assert bare["answers"]["profile tiny"][2] == by_torch_alone
    for line, extra in NEEDS.items():
        command = " ".join(line.split()[: 2 if line.startswith("data") else 1])
        packages = "|".join(EXTRAS[extra])
        status, out, message = bare["answers"][line]
        assert (status, out) == (2, ""), line
        assert re.fullmatch(rf"mmmae {command}: needs ({packages}): pip install 'mmmae\[{extra}\]'\n", message), message


def test_without_readers_and_writers_of_files_the_message_names_their_extra(tmp_path):
    for package in ("rasterio", "h5py"):
        (tmp_path / package).mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "rasterio" / "cube.tif")
    (tmp_path / "h5py" / "cube.h5").write_bytes(b"?")
    expected = {
        f"data check {tmp_path / 'rasterio'}": "mmmae data check: needs rasterio: pip install 'mmmae[data]'\n",
        f"data check {tmp_path / 'h5py'}": "mmmae data check: needs h5py: pip install 'mmmae[data]'\n",
        "pretrain": "mmmae pretrain: needs scipy: pip install 'mmmae[data]'\n",
    }
    absent = BLOCK.format(absent=set(EXTRAS["data"]))
    found = json.loads(run(absent + COMMANDS.format(lines=list(expected)) + "print(json.dumps(answers))"))
    for line, message in expected.items():
        assert found[line] == [2, "", message], line

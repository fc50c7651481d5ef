"""What each part imports: the kernel library PyTorch alone, the model a bare install, commands also their extras."""

import json
import re
import subprocess
import sys

from PIL import Image

import mmmae
from mmmae.extras import EXTRAS

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


def test_the_kernel_library_imports_nothing_but_torch_and_not_its_compiler():
    code = "import sys, torch; before = set(sys.modules); import mmmae_kernels; print(*set(sys.modules) - before)"
    added = set(run(code).split())
    foreign = {name for name in added if name.split(".")[0] not in {*sys.stdlib_module_names, "mmmae_kernels"}}
    assert foreign == set()
    assert "torch._dynamo" not in added


def test_the_model_does_not_load_what_only_some_calls_need():
    """These take several times as long to import as the package itself."""
    added = set(run("import sys, mmmae; print(*sys.modules)").split())
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


def test_torchs_counter_knows_the_operators_whenever_it_is_imported():
    count = """
q = torch.randn(2, 5, 3, 2, 8)
with FlopCounterMode(display=False) as counter:
    mmmae_kernels.attention(q, backend=backend)
print(counter.get_total_flops())
"""
    start = """
import torch, mmmae_kernels
backend = "native" if mmmae_kernels.explain("attention")["native"] == "serves" else "eager"
"""
    counter = "from torch.utils.flop_counter import FlopCounterMode\n"
    expected = 2 * 2 * 2 * 5 * 5 * 2 * 8  # scores and mix, two operations a multiply-add
    assert int(run(start + counter + count)) == int(run(counter + start + count)) == expected


def test_a_model_trains_and_is_profiled_by_a_bare_install():
    code = """
import torch, mmmae
model = mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), aux_patch=16)
model(torch.randn(2, 1, 12, 32, 32), seed=0).loss.backward()
print(model.hsi_encoder()(torch.randn(1, 1, 12, 32, 32)).shape[1])
print(mmmae.profile("tiny").encoder.total.macs)
"""
    assert run(BLOCK.format(absent=OPTIONAL) + code).split() == ["64", str(mmmae.profile("tiny").encoder.total.macs)]


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
print(json.dumps(answers))
"""


def answers(lines, absent):
    """Return status, output and errors of each command line, run where the packages are absent."""
    return json.loads(run(BLOCK.format(absent=set(absent)) + COMMANDS.format(lines=list(lines))))


def test_by_a_bare_install_each_command_works_or_names_the_extra_that_it_needs():
    needs = {
        "pretrain": "train",
        "finetune --encoder e --hsi h --task segmentation --labels l": "train",
        "encode --encoder e --hsi h --out o.npz": "train",
        "reconstruct --model m --hsi h --out o": "train",
        "info": "train",
        "import c.pth --out o": "train",
        "import-spectralgpt c.pth --out o": "train",
        "data phantom o": "data",
    }
    found = answers(["--help", "pretrain --help", "profile tiny", *needs], OPTIONAL)
    for line in ("--help", "pretrain --help", "profile tiny"):
        status, out, _ = found[line]
        assert (status, bool(out)) == (0, True), line
    assert found["profile tiny"][2] == "counted by PyTorch alone; fvcore checks it: pip install 'mmmae[profile]'\n"
    for line, extra in needs.items():
        command = " ".join(line.split()[: 2 if line.startswith("data") else 1])
        packages = "|".join(EXTRAS[extra])
        status, out, message = found[line]
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
    found = answers(expected, EXTRAS["data"])
    for line, message in expected.items():
        assert found[line] == [2, "", message], line

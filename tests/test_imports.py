"""What an import brings with it: the kernel library torch alone, the model no more than it needs."""

import subprocess
import sys

BLOCK = "import sys; sys.modules.update(dict.fromkeys({absent!r}))  # as if not installed\n"
OPTIONAL = {
    *("lightning", "torchmetrics", "rasterio", "scipy", "h5py", "matplotlib", "rich", "fvcore", "webdataset"),
    *("onnx", "onnxscript", "onnxruntime", "transformers", "peft", "sklearn", "tensorboard", "flash_attn", "xformers"),
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernel_library_imports_nothing_but_torch_and_not_its_compiler():
    code = "import sys, torch; before = set(sys.modules); import mmmae_kernels; print(*set(sys.modules) - before)"
    added = set(run(code).split())
    foreign = {name for name in added if name.split(".")[0] not in {*sys.stdlib_module_names, "mmmae_kernels"}}
    assert foreign == set()
    assert "torch._dynamo" not in added


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


def test_a_model_trains_without_what_is_optional():
    code = """
import torch, mmmae
model = mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), aux_patch=16)
model(torch.randn(2, 1, 12, 32, 32), seed=0).loss.backward()
print(model.hsi_encoder()(torch.randn(1, 1, 12, 32, 32)).shape[1])
"""
    assert run(BLOCK.format(absent=OPTIONAL) + code).strip() == "64"

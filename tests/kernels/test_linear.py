"""Linear layers by either library against float64, and which library is taken."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from mmmae_kernels import linear as module
from mmmae_kernels import use_backend

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
LIBRARIES = [False, pytest.param(True, marks=needs_onednn)]
SHAPES = [(1, 1, 1), (7, 5, 3), (63, 64, 65), (2, 0, 3), (784, 768, 100)]  # rows, H, D
ROUNDING = 1e-6  # relative; float32 rounds by 6e-8, and errors of a sum of 768 add up like a random walk


def relative_error(ours, truth):
    return float((ours.detach().double() - truth.detach()).norm() / truth.norm().clamp(min=1e-30))


@pytest.fixture
def library(request, monkeypatch):
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", request.param)


@pytest.mark.parametrize("library", LIBRARIES, indirect=True, ids=["mkl", "onednn"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_outputs_and_gradients_are_those_of_the_definition(library, rows, inputs, outputs, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(2, rows, inputs), torch.randn(outputs, inputs)
    arguments = [x, weight, torch.randn(outputs)] if bias else [x, weight]
    upstream = torch.randn(outputs, 2, rows).permute(1, 2, 0)  # no dense rows
    ours = [tensor.clone().requires_grad_() for tensor in arguments]
    truth = [tensor.double().requires_grad_() for tensor in arguments]
    out, expected = module.linear(*ours), F.linear(*truth)
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= ROUNDING
    grads = torch.autograd.grad(out, ours, upstream)
    for grad, true in zip(grads, torch.autograd.grad(expected, truth, upstream.double()), strict=True):
        assert relative_error(grad, true) <= ROUNDING


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(24, 72), (72, 24), (40, 40)])
def test_the_weights_gradient_of_half_precision_is_rounded_once(half, outputs, inputs):
    """Whichever factor is transposed by a copy; it is stored as the float32 parameter is."""
    torch.manual_seed(0)
    grad, x = torch.randn(3, 50, outputs).to(half)[1], torch.randn(50, inputs).to(half)
    found = module.matmuls_for(x, half, torch.float32).weight_gradient(grad, x)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert relative_error(found, grad.double().t() @ x.double()) <= torch.finfo(half).eps / 2


@needs_onednn
def test_a_transposed_view_is_multiplied_as_what_it_is(monkeypatch):
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", True)
    torch.manual_seed(0)
    grad, weight = torch.randn(50, 30), torch.randn(30, 20)
    assert relative_error(module.linear_no_grad(grad, weight.t()), grad.double() @ weight.double()) <= ROUNDING


@needs_onednn
def test_onednn_serves_float32_on_the_cpu_and_nothing_else(monkeypatch):
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", True)
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    assert "_Linear" in module.linear(x, weight).grad_fn.name()
    assert "_Linear" not in module.linear(x.double(), weight.double()).grad_fn.name()
    with use_backend("eager"):
        assert "_Linear" not in module.linear(x, weight).grad_fn.name()
    with torch.autocast("cpu", torch.bfloat16):
        assert module.linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", False)
    assert "_Linear" not in module.linear(x, weight).grad_fn.name()


@pytest.mark.parametrize(
    ("vendor", "capability", "faster"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
@needs_onednn
def test_onednn_is_taken_on_amd_with_avx512(monkeypatch, tmp_path, vendor, capability, faster):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(module, "CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert module.onednn_is_faster() is faster
    cpuinfo.unlink()
    assert module.onednn_is_faster() is False


@needs_onednn
@pytest.mark.parametrize("kind", ["a column of a matrix", "expanded", "reversed by stride 2"])
def test_a_bias_of_any_stride_is_read_where_it_lies(monkeypatch, kind):
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", True)
    bias = {
        "a column of a matrix": torch.arange(26.0).view(13, 2)[:, 0],
        "expanded": torch.full((1,), 5.0).expand(13),
        "reversed by stride 2": torch.arange(39.0)[::3],
    }[kind]
    x, weight = torch.zeros(2, 3, 16), torch.zeros(13, 16)
    assert torch.equal(module.linear(x, weight, bias), bias.expand(2, 3, 13))
    assert torch.equal(module.linear_no_grad(x, weight, bias), bias.expand(2, 3, 13))


@needs_onednn
@pytest.mark.parametrize(
    ("environment", "served"),
    [({}, True), ({"OMP_THREAD_LIMIT": "1"}, False), ({"OMP_DYNAMIC": "true"}, False)],
    ids=["all threads", "OMP_THREAD_LIMIT", "OMP_DYNAMIC"],
)
def test_onednn_is_left_where_openmp_gives_fewer_threads_than_it_was_promised(environment, served):
    code = """
import torch
torch.set_num_threads(2)
from mmmae_kernels import linear
linear.ONEDNN_IS_FASTER = True
x, weight = torch.randn(784, 768), torch.randn(768, 768)
error = (linear.linear_no_grad(x, weight).double() - x.double() @ weight.double().T).norm() / 768
print(linear.uses_onednn(x, weight), float(error) < 1e-3)
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(served), "True"], done.stderr


@pytest.mark.parametrize("tuned", [False, True])
def test_tunable_op_is_asked_for_no_float32_product_of_halves(monkeypatch, tuned):
    def product(a, b, out_dtype=None):
        if out_dtype is not None and tuned:
            raise RuntimeError("Tunable GEMM is not supported for float output with reduced float input")
        asked.append(out_dtype)
        return a.float() @ b.float() if out_dtype is not None else a @ b

    asked = []
    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch._C, "_cuda_tunableop_is_enabled", lambda: tuned, raising=False)
    on_gpu = SimpleNamespace(is_cuda=True)
    matmuls = module.matmuls_for(on_gpu, torch.bfloat16, torch.float32)
    grad, x = torch.randn(7, 5, dtype=torch.bfloat16), torch.randn(7, 3, dtype=torch.bfloat16)
    weight_gradient = matmuls.weight_gradient(grad, x)
    assert weight_gradient.dtype == matmuls.dtype == torch.float32
    assert relative_error(weight_gradient, grad.double().t() @ x.double()) <= (0.01 if tuned else ROUNDING)
    assert asked == [None if tuned else torch.float32]

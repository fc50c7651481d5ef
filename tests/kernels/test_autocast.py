"""Copies of weights under autocast: which are made, which ops use them, and whom the gradients reach."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs triton")

import mmmae
from mmmae.model import encoder
from mmmae_kernels import autocast, use_backend
from mmmae_kernels.autocast import ALIGNMENT, cast, cast_once, copy_of, current_copies, use_copies
from mmmae_kernels.gpu.executors import execute_by
from mmmae_kernels.linear import linear, matmuls_for
from mmmae_kernels.transformer_block import fused
from tests.emulator.gpu import Emulator, emulated


class AcceptsLaunches:
    """An executor that stands for a GPU and runs nothing."""

    target = "sm90"

    def __call__(self, launch):
        return launch.configs[0]


@pytest.fixture
def gpu():
    with execute_by(AcceptsLaunches()), torch.autocast("cpu", torch.bfloat16):
        yield


class Operators(TorchDispatchMode):
    """Collects the names of operators, and the dtypes that casts take from and to."""

    def __init__(self):
        super().__init__()
        self.names, self.casts = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function._schema.name)
        if function._schema.name in ("aten::_to_copy", "aten::to"):  # the latter in inference mode
            self.casts.append((tuple(args[0].shape), result.dtype))
        return result


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def test_all_weights_are_copied_by_one_operator_into_aligned_memory(gpu):
    weights = [parameter(3, 5), parameter(7), parameter(1, 1, 2, 3, 4), parameter(0, 4), parameter(64, 2)]
    with Operators() as operators:
        copies = cast_once(iter(weights))
    assert operators.names.count("aten::_foreach_copy_") == 1
    assert operators.casts == []
    with use_copies(copies):
        for weight in weights:
            copy = copy_of(weight)
            assert torch.equal(copy, weight.bfloat16())
            assert copy.storage_offset() % ALIGNMENT == 0
            assert not copy.requires_grad
            assert cast(weight, torch.bfloat16) is copy
            assert cast(weight, torch.float16).dtype == torch.float16
            assert cast(weight, torch.float32) is weight


class Subclass(torch.Tensor):
    pass


def test_weights_that_ops_have_to_cast_are_left_out(gpu):
    plain = parameter(4, 4)
    others = [
        None,
        nn.Parameter(torch.randn(4, 6).t()),
        nn.Parameter(torch.randn(4).double()),
        nn.Parameter(torch.randn(4).half()),
        torch.randn(4, device="meta"),
        torch.randn(4).as_subclass(Subclass),
    ]
    assert [weight is plain for weight, _ in cast_once([None, plain, *others]).values()] == [True]


def test_weights_are_copied_for_native_kernels_that_take_half_precision(monkeypatch):
    weights = [parameter(4, 4)]
    monkeypatch.setattr(autocast, "native_unavailable", lambda: None)
    for reason, copies in ((None, 1), ("native kernels take float32", 0)):
        monkeypatch.setattr(autocast, "native_refuses", lambda tensors, reason=reason: reason)
        with torch.autocast("cpu", torch.bfloat16):
            assert len(cast_once(weights)) == copies
            for backend, expected in (("native", copies), ("eager", 0), ("triton", 0)):
                with use_backend(backend):
                    assert len(cast_once(weights)) == expected
        assert cast_once(weights) == {}


def test_nothing_is_copied_where_no_kernel_takes_it(monkeypatch):
    weights = [parameter(4, 4)]
    monkeypatch.setattr(autocast, "native_unavailable", lambda: "the native library was not built")
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_once(weights) == {}  # PyTorch's layers run
    with execute_by(AcceptsLaunches()):
        assert cast_once(weights) == {}
        with torch.autocast("cpu", torch.bfloat16):
            assert cast_once([nn.Parameter(torch.randn(4).double())]) == {}
            assert len(cast_once(weights)) == 1
            with use_backend("eager"):
                assert cast_once(weights) == {}


def test_copies_end_with_the_block_and_belong_to_its_thread(gpu):
    weight = parameter(4, 4)
    inner, outer = cast_once([weight]), cast_once([weight])
    found = []
    with use_copies(outer):
        with use_copies(inner):
            assert current_copies() is inner
            thread = threading.Thread(target=lambda: found.append(copy_of(weight)))
            thread.start()
            thread.join()
        assert current_copies() is outer
    assert found == [None]
    assert copy_of(weight) is None


def test_a_weight_that_was_gathered_since_is_cast_anew(gpu):
    weight = nn.Parameter(torch.empty(0))  # as a wrapper keeps a weight whose shards are elsewhere
    with use_copies(cast_once([weight])):
        weight.data = torch.randn(3, 4)
        assert copy_of(weight) is None
        assert torch.equal(cast(weight, torch.bfloat16), weight.bfloat16())


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_linear_layer_takes_the_copies(gpu, grad_mode):
    x, weight, bias = torch.randn(2, 5, 6), parameter(4, 6), parameter(4)
    with grad_mode():
        expected = F.linear(x, weight, bias)
        with use_copies(cast_once([weight, bias])), Operators() as operators:
            out = linear(x, weight, bias)
    assert torch.equal(out, expected)
    assert operators.casts == [((2, 5, 6), torch.bfloat16)]


def test_gradients_reach_the_weights_in_their_own_dtype(gpu):
    x, weight, bias = parameter(2, 5, 6), parameter(4, 6), parameter(4)
    grad = torch.randn(2, 5, 4).bfloat16()

    def gradients(out):
        return torch.autograd.grad(out, (x, weight, bias), grad)

    expected = gradients(F.linear(x, weight, bias))
    with use_copies(cast_once([weight, bias])):
        out = linear(x, weight, bias)
    with Operators() as operators:
        found = gradients(out)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    shapes = [shape for shape, _ in operators.casts]
    assert (4,) not in shapes  # the sum of the bias's gradient is in float32


def test_copies_of_two_forward_passes_live_side_by_side(gpu):
    x, weight = torch.randn(3, 6), parameter(4, 6)
    outs = []
    for _ in range(2):
        with use_copies(cast_once([weight])):
            outs.append(linear(x, weight))
        with torch.no_grad():
            weight += 1  # of a step between them
    assert not torch.equal(*outs)
    with torch.no_grad():
        assert torch.equal(outs[0], F.linear(x, weight - 2))
    sum(out.sum() for out in outs).backward()
    torch.testing.assert_close(weight.grad, 2 * x.bfloat16().sum(0).float().expand(4, 6), rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_on_nvidias_gpus_a_product_gives_the_weights_gradient_in_float32(half, monkeypatch):
    with FakeTensorMode():
        grad, x = (torch.empty(5, width, dtype=half, device="cuda") for width in (4, 6))
        with Operators() as operators:
            out = matmuls_for(x, half, torch.float32).weight_gradient(grad, x)
        assert (out.shape, out.dtype) == ((4, 6), torch.float32)
        assert (operators.casts, operators.names.count("aten::mm")) == ([], 1)
        monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD's library has no such product
        with Operators() as operators:
            out = matmuls_for(x, half, torch.float32).weight_gradient(grad, x)
        assert out.dtype == torch.float32
        assert operators.casts == [((4, 6), torch.float32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weights_gradient_has_the_dtype_of_the_weight(dtype):
    grad, x = torch.randn(5, 4).bfloat16(), torch.randn(5, 6).bfloat16()
    found = matmuls_for(x, torch.bfloat16, dtype).weight_gradient(grad, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), grad.float().t() @ x.float(), rtol=1e-2, atol=1e-2)


SIZES = {"image_size": 32, "patch": (3, 8, 8), "dim": 32, "heads": 2, "depth": 2, "aux": {"ir": 1}}
SIZES |= {"aux_dim": 16, "aux_depth": 1, "aux_patch": 16, "decoder_dim": 32, "decoder_heads": 2, "decoder_depth": 1}


@pytest.fixture
def on_emulator(on_gpu):
    """Run Triton's kernels on the emulator and attention on a stand-in, as on a GPU."""
    on_gpu("sm80", "flash_attn_2")
    with emulated(Emulator("sm80")):
        yield


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hsi = torch.randn(2, 1, 12, 32, 32, generator=generator)
    return hsi.to(dtype), {"ir": torch.randn(2, 1, 32, 32, generator=generator).to(dtype)}


def train(model, half=torch.bfloat16, dtype=torch.float32):
    """Return prediction, loss and gradients of a step."""
    with torch.autocast("cpu", half, enabled=dtype == torch.float32):
        out = model(*inputs(dtype), seed=0)
    model.zero_grad()
    out.loss.backward()
    return {"prediction": out.prediction.detach(), "loss": out.loss.detach()} | {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_block_takes_the_copies_in_forward_and_when_recomputed(on_emulator, monkeypatch, recompute):
    model = mmmae.fast_model("tiny", **SIZES, activation_checkpointing=recompute)
    taken = []
    monkeypatch.setattr(fused, "cast", lambda weight, dtype: taken.append(copy_of(weight)) or cast(weight, dtype))
    keys = [*model.state_dict()]
    found = train(model)
    assert len(taken) == 5 * (4 + (3 if recompute else 0))  # weights of two blocks, one of the decoder, one of an image
    assert all(copy is not None for copy in taken)
    assert [*model.state_dict()] == keys
    # Each weight cast by itself.
    monkeypatch.setattr(encoder, "cast_once", lambda weights: {id(w): (w, w.detach().bfloat16()) for w in weights})
    expected = train(model)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


def test_a_step_errs_at_most_twice_as_much_as_the_reference_in_bfloat16(on_emulator):
    reference = mmmae.reference_model("tiny", **SIZES)
    fast = mmmae.fast_model(copy.deepcopy(reference))
    exact, theirs, ours = train(copy.deepcopy(reference).double(), dtype=torch.float64), train(reference), train(fast)

    def error(found, names):
        return sum(float((found[name].double() - exact[name]).square().sum()) for name in names) ** 0.5

    parts = {name: [key for key in exact if key.startswith(f"{name}.")] for name, _ in reference.named_children()}
    for part, names in {**parts, "prediction": ["prediction"], "loss": ["loss"]}.items():
        allowed = 2 * error(theirs, names) + 1e-6
        assert error(ours, names) <= allowed, (part, error(ours, names), allowed)

"""Copies of weights under autocast: which are made, which ops use them, and whom the gradients reach."""

import threading

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmmae_kernels import use_backend
from mmmae_kernels.autocast import ALIGNMENT, cast, cast_once, copy_of, current_copies, use_copies
from mmmae_kernels.gpu.executors import execute_by
from mmmae_kernels.linear import linear, matmuls_for

pytest.importorskip("triton", reason="needs triton")


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


def test_nothing_is_copied_where_no_kernel_takes_it():
    weights = [parameter(4, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_once(weights) == {}  # on a CPU, where PyTorch's layers run
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

"""Derivatives that fused kernels do not have are refused, never zero or constant without a word."""

import pytest
import torch
from torch.autograd import forward_ad

from mmmae_kernels import attention, concat_attention, use_backend
from mmmae_kernels import linear as linear_module
from mmmae_kernels.cpu import library as native
from tests.cases.ops import CASES

needs_library = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))

ONE_OF_EACH = {case.op: case for case in reversed(CASES) if case.small}


def leaves_of(case):
    inputs = {
        name: t.detach().float() if t is not None and t.is_floating_point() else t for name, t in case.make().items()
    }
    leaves = [
        tensor.requires_grad_()
        for name, tensor in inputs.items()
        if tensor is not None and tensor.is_floating_point() and name not in case.constant
    ]
    return inputs, leaves


def total(outputs):
    return sum(output.square().sum() for output in outputs)


@needs_library
@pytest.mark.parametrize("op", [op for op in ONE_OF_EACH if op != "patchify"])
def test_a_second_derivative_is_refused(op):
    inputs, leaves = leaves_of(ONE_OF_EACH[op])
    with use_backend("native"), pytest.raises(RuntimeError, match=r"differentiated again; use_backend\('eager'\)"):
        torch.autograd.grad(total(ONE_OF_EACH[op].call(inputs)), leaves, create_graph=True, allow_unused=True)


@needs_library
@pytest.mark.parametrize("op", ONE_OF_EACH)
def test_a_tangent_is_refused(op):
    """Forward mode, by dual numbers and as torch.func does it."""
    inputs, leaves = leaves_of(ONE_OF_EACH[op])
    name = next((name for name, tensor in inputs.items() if any(tensor is leaf for leaf in leaves)), "volume")
    point = inputs[name].detach()

    def function(tensor):
        return total(ONE_OF_EACH[op].call({**inputs, name: tensor}))

    with use_backend("native"):
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            function(forward_ad.make_dual(point, torch.ones_like(point)))
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(function, (point,), (torch.ones_like(point),))


@needs_library
def test_attention_and_linear_refuse_too(monkeypatch):
    monkeypatch.setattr(linear_module, "ONEDNN_IS_FASTER", True)
    qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    vectors, present = torch.randn(2, 1, 2, 2, 8), torch.ones(2, 1, dtype=torch.bool)
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    functions = (
        (qkv, lambda qkv: attention(qkv, backend="native")),
        (qkv, lambda qkv: concat_attention(qkv, vectors, present, backend="native")),
        (x, lambda x: linear_module.linear(x, weight)),
    )
    for point, function in functions:
        with pytest.raises(RuntimeError, match="differentiated again"):
            torch.autograd.grad(function(point).sum(), point, create_graph=True)
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            function(forward_ad.make_dual(point.detach(), torch.ones_like(point)))

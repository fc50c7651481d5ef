"""Kernels with a stack of weights, one for each equal part of the rows, executed as compiled."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional as F

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: there is no compiled code to execute", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

from mmmae_kernels.add_layer_norm.gpu import add_layer_norm_backward, add_layer_norm_forward
from mmmae_kernels.gelu_linear.gpu import gelu_backward, gelu_forward
from mmmae_kernels.gpu.groups import GROUP
from tests.emulator.gpu import Emulator, emulated

# Weights, rows of each, and width: a row, rows of part of a program, and of more than a group of programs.
SHAPES = [(1, 5, 72), (2, 1, 129), (3, 13, 40), (2, 8 * GROUP + 3, 520), (3, 0, 8)]
HALF = torch.bfloat16  # of products; the stream and the parameters are in float32, as under autocast


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_results(weights, rows, width):
    """Return what the kernels of the norm compute, and what float64 does."""
    x, residual = draw(weights, rows, width), draw(weights, rows, width, dtype=HALF, seed=1)
    bias, weight, shift = (draw(weights, width, seed=seed) for seed in (2, 3, 4))
    grad_total, grad_norm = draw(weights, rows, width, seed=5), draw(weights, rows, width, dtype=HALF, seed=6)
    total, norm, statistics, counters = add_layer_norm_forward(x, residual, shift, weight, bias, 1e-6, HALF)
    grad_x, grad_weight, grad_bias, grad_shift, again, _ = add_layer_norm_backward(
        grad_total, grad_norm, total, weight, bias, statistics, counters, torch.float32, HALF
    )
    assert rows == 0 or not counters.any()
    assert torch.equal(again, norm)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias, shift)]
    exact_total = leaves[0] + residual.double() + leaves[3][:, None]
    exact_norm = F.layer_norm(exact_total, (width,), eps=1e-6) * leaves[1][:, None] + leaves[2][:, None]
    grads = torch.autograd.grad([exact_total, exact_norm], leaves, [grad_total.double(), grad_norm.double()])
    return [total, norm, grad_x, grad_weight, grad_bias, grad_shift], [exact_total, exact_norm, *grads]


def gelu_results(weights, rows, width):
    """Return what the kernels of GELU compute, and what float64 does."""
    hidden, bias = draw(weights, rows, width, dtype=HALF), draw(weights, width, seed=1)
    grad = draw(weights, rows, width, dtype=HALF, seed=2)
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, bias)]
    exact = F.gelu(leaves[0] + leaves[1][:, None])
    grads = torch.autograd.grad(exact, leaves, grad.double())
    activated, counters = gelu_forward(hidden, bias)
    again, grad_bias = gelu_backward(grad, hidden, bias, counters)
    assert rows == 0 or not counters.any()
    assert torch.equal(again, activated)
    return [activated, grad, grad_bias], [exact, *grads]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("results", [norm_results, gelu_results])
def test_each_part_of_the_rows_has_its_weight(results, shape):
    with emulated(Emulator("sm80")):
        found, expected = results(*shape)
    for value, wanted in zip(found, expected, strict=True):
        assert value.shape == wanted.shape
        rounding = 1e-5 if value.dtype == torch.float32 else torch.finfo(HALF).eps / 2
        assert (value - wanted).norm() <= rounding * wanted.norm()

"""The block's and the conditioning step's node in the types of autocast: float32 stream, half products and residuals.

Their kernels stand in as plain PyTorch that computes in float32 and rounds once, as those of a GPU do.
"""

import types

import pytest
import torch
from torch.nn import functional as F

from mmmae_kernels import BlockWeights, operators
from mmmae_kernels.linear import matmuls_for
from mmmae_kernels.transformer_block.conditioning import (
    ConditioningWeights,
    FusedConditioning,
    conditioning_reference,
)
from mmmae_kernels.transformer_block.fused import FusedBlock
from mmmae_kernels.transformer_block.plan import Plan
from mmmae_kernels.transformer_block.reference import transformer_block_reference
from tests.cases.case import draw, draw_ids

BATCH, TOKENS, WIDTH, HEADS, HIDDEN = 2, 33, 48, 3, 80
SHAPES = {
    **{"norm1_weight": (WIDTH,), "norm1_bias": (WIDTH,), "qkv_weight": (3 * WIDTH, WIDTH), "qkv_bias": (3 * WIDTH,)},
    **{"proj_weight": (WIDTH, WIDTH), "proj_bias": (WIDTH,), "norm2_weight": (WIDTH,), "norm2_bias": (WIDTH,)},
    **{"fc1_weight": (HIDDEN, WIDTH), "fc1_bias": (HIDDEN,), "fc2_weight": (WIDTH, HIDDEN)},
}


def layer_norm_forward(x, residual, residual_bias, weight, bias, epsilon, dtype):
    total = x.new_empty(0)
    if residual is not None:
        total = x.float() + residual.float() + (0 if residual_bias is None else residual_bias.float())
        total = x = total.to(torch.promote_types(x.dtype, residual.dtype))
    rows = x.float().flatten(0, -2)
    mean, rstd = rows.mean(-1), (rows.var(-1, unbiased=False) + epsilon).rsqrt()
    norm = (rows - mean[:, None]) * rstd[:, None] * weight.float() + bias.float()
    return total, norm.view(x.shape).to(dtype), mean, rstd


def layer_norm_backward(grad_total, grad_norm, total, weight, bias, mean, rstd, sum_dtype):
    unit = (total.float() - mean[:, None]) * rstd[:, None]
    grad, scaled = grad_norm.float(), grad_norm.float() * weight.float()
    grad_x = (scaled - scaled.mean(-1, keepdim=True) - unit * (scaled * unit).mean(-1, keepdim=True)) * rstd[:, None]
    grad_x = grad_x if grad_total is None else grad_x + grad_total.float()
    norm = total.new_empty(0) if bias is None else (unit * weight.float() + bias.float()).to(grad_norm.dtype)
    row_sum = total.new_empty(0) if sum_dtype is None else grad_x.sum(0).to(sum_dtype)
    sums = (grad * unit).sum(0).to(weight.dtype), grad.sum(0).to(weight.dtype)
    return grad_x.to(total.dtype), *sums, row_sum, norm


def gelu_forward(hidden, hidden_bias):
    return F.gelu(hidden.float() + hidden_bias.float()).to(hidden.dtype)


def gelu_backward(grad, hidden, hidden_bias):
    assert grad.dtype == hidden.dtype
    with torch.enable_grad():
        x = (hidden.float() + hidden_bias.float()).detach().requires_grad_()
        activated = F.gelu(x)
        (by_hidden,) = torch.autograd.grad(activated, x, grad.float())
    grad.copy_(by_hidden)
    return activated.detach().to(hidden.dtype), by_hidden.sum(0).to(hidden_bias.dtype)


def split(projected):
    return (projected[0], *projected[1].unbind(2)) if len(projected) == 2 else projected[0].unbind(2)


def attention_forward(projected, key_present, backend):
    q, k, v = (tensor.float() for tensor in split(projected))
    with torch.autocast("cpu", enabled=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return out.to(projected[0].dtype).contiguous(), scores.logsumexp(-1)


def attention_backward(grad, projected, key_present, out, lse, backend):
    """Compute gradients from the given log-sum-exp and output, which may be those of more keys."""
    q, k, v = (tensor.float() for tensor in split(projected))
    assert grad.dtype == out.dtype == projected[0].dtype
    share = (torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 - lse[..., None]).exp()
    grad, out = grad.float(), out.float()
    subtracted = (grad * out).sum(-1).transpose(1, 2)[..., None]
    scores = share * (torch.einsum("bqhd,bkhd->bhqk", grad, v) - subtracted) / q.shape[-1] ** 0.5
    grad_q = torch.einsum("bhqk,bkhd->bqhd", scores, k)
    grad_k, grad_v = torch.einsum("bhqk,bqhd->bkhd", scores, q), torch.einsum("bhqk,bqhd->bkhd", share, grad)
    parts = [[grad_q], [grad_k, grad_v]] if len(projected) == 2 else [[grad_q, grad_k, grad_v]]
    return [
        (torch.stack(part, dim=2) if len(part) > 1 else part[0]).to(projected[0].dtype).contiguous() for part in parts
    ]


@pytest.fixture
def kernels(monkeypatch):
    stand_ins = types.SimpleNamespace(
        add_layer_norm_forward=layer_norm_forward,
        add_layer_norm_backward=layer_norm_backward,
        gelu_forward=gelu_forward,
        gelu_backward=gelu_backward,
        attention_forward=attention_forward,
        attention_backward=attention_backward,
    )
    monkeypatch.setitem(operators._direct, "native", stand_ins)


def compare(ours, theirs, truth, dtype):
    """Apply the rule of tests/cases: at most twice the error of PyTorch's expression, or one rounding of the result."""
    for place, (value, other, wanted) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert value.dtype == other.dtype, place
        error = (value.double() - wanted).norm()
        allowed = max(2 * (other.double() - wanted).norm(), torch.finfo(dtype).eps / 2 * wanted.norm())
        assert error <= allowed + 1e-6 * wanted.numel() ** 0.5, (place, float(error), float(allowed))


def results(function, leaves, half=None):
    with torch.autocast("cpu", half, enabled=half is not None):
        outputs = function(*leaves)
    incoming = [draw(*output.shape, seed=9 + place).to(output.dtype) for place, output in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf is not None], incoming)
    return [output.detach() for output in outputs] + list(grads)


def leaves_of(tensors, dtype, half, products=(1,)):
    """Return the inputs in float32, except those that products made under autocast: the residual and the vectors."""
    types = [half if place in products else torch.float32 for place in range(len(tensors))]
    rounded = [tensor.to(own) for tensor, own in zip(tensors, types, strict=True)]
    return [(tensor.double() if dtype == torch.float64 else tensor).requires_grad_() for tensor in rounded]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("some", [False, True], ids=["all tokens", "some tokens"])
def test_a_block_under_autocast_errs_at_most_twice_as_much_as_torch(kernels, half, some):
    weights = {name: draw(*shape, seed=20 + i) / shape[-1] ** 0.5 for i, (name, shape) in enumerate(SHAPES.items())}
    tensors = [draw(BATCH, TOKENS, WIDTH), draw(BATCH, TOKENS, WIDTH, seed=1), draw(WIDTH, seed=2), *weights.values()]
    ids = draw_ids(BATCH, 12, TOKENS) if some else None

    def define(x, residual, bias, *rest):
        return transformer_block_reference(x, residual, bias, BlockWeights(*rest), HEADS, ids, 1e-6)

    def node(*leaves):
        plan = Plan(
            *("native", "native", half, matmuls_for(leaves[0], leaves[5])), tuple(leaf.dtype for leaf in leaves)
        )
        return FusedBlock.apply(plan, HEADS, ids, 1e-6, *leaves)

    truth = results(define, leaves_of(tensors, torch.float64, half))
    theirs = results(define, leaves_of(tensors, torch.float32, half), half)
    ours = results(node, leaves_of(tensors, torch.float32, half), half)
    compare(ours, theirs, truth, half)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_conditioning_under_autocast_errs_at_most_twice_as_much_as_torch(kernels, half):
    names = ("norm1_weight", "norm1_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    weights = [draw(*SHAPES[name], seed=20 + i) / SHAPES[name][-1] ** 0.5 for i, name in enumerate(names)]
    tensors = [draw(BATCH, TOKENS, WIDTH), draw(BATCH, TOKENS, WIDTH, seed=1), draw(WIDTH, seed=2)]
    tensors += [draw(BATCH, 3, WIDTH, seed=3), *weights]
    present = torch.tensor([[True, False, True], [False, False, True]])

    def define(x, residual, bias, vectors, *rest):
        return conditioning_reference(x, residual, bias, vectors, present, ConditioningWeights(*rest), HEADS, 1e-6)

    def node(*leaves):
        plan = Plan(
            *("native", "native", half, matmuls_for(leaves[0], leaves[6])), tuple(leaf.dtype for leaf in leaves)
        )
        return FusedConditioning.apply(plan, HEADS, 1e-6, present, *leaves)

    truth = results(define, leaves_of(tensors, torch.float64, half, (1, 3)))
    theirs = results(define, leaves_of(tensors, torch.float32, half, (1, 3)), half)
    ours = results(node, leaves_of(tensors, torch.float32, half, (1, 3)), half)
    compare(ours, theirs, truth, half)

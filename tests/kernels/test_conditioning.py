"""The conditioning step as one node, against its definition in float64, forward and every gradient."""

import pytest
import torch

from mmmae_kernels import use_backend
from mmmae_kernels.cpu import library as native
from mmmae_kernels.transformer_block.conditioning import (
    ConditioningCall,
    ConditioningWeights,
    FusedConditioning,
    conditioning_reference,
    run_conditioning,
)
from tests.cases.case import draw

needs_library = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
SHAPES = {
    "odd": (3, 5, 2, 24, 3),
    "one token": (2, 1, 1, 16, 1),
    "past a block": (2, 33, 3, 72, 2),
    "none": (0, 4, 2, 16, 2),
}


def inputs_of(shape, dtype, residual):
    batch, tokens, guides, width, heads = SHAPES[shape]
    sizes = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    weights = [draw(*size, seed=10 + place) / size[-1] ** 0.5 for place, size in enumerate(sizes)]
    x, added, bias = draw(batch, tokens, width), draw(batch, tokens, width, seed=1), draw(width, seed=2)
    vectors = draw(batch, guides, width, seed=3)
    tensors = [x, *([added, bias] if residual else []), vectors, *weights]
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    x, vectors, *weights = (tensors[0], *tensors[3 if residual else 1 :])
    added, bias = tensors[1:3] if residual else (None, None)
    present = torch.arange(batch * guides).view(batch, guides) % 3 != 1
    return (x, added, bias, vectors, present, ConditioningWeights(*weights), heads, 1e-6), tensors


def condition(*arguments):
    return run_conditioning(ConditioningCall(*arguments[:-1]), arguments[-1])


def results(function, arguments, leaves, *options):
    outputs = function(*arguments, *options)
    grads = torch.autograd.grad(sum(output.square().sum() for output in outputs), leaves)
    return [output.detach() for output in outputs] + list(grads)


@needs_library
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ["native", "eager"])
def test_float32_is_within_1e_5_of_the_definition(shape, residual, attention):
    wanted = results(conditioning_reference, *inputs_of(shape, torch.float64, residual))
    with use_backend("native"):
        ours = results(condition, *inputs_of(shape, torch.float32, residual), attention)
    for place, (value, truth) in enumerate(zip(ours, wanted, strict=True)):
        assert (value.double() - truth).norm() <= 1e-5 * truth.norm() + 1e-6 * truth.numel() ** 0.5, place


@needs_library
def test_it_is_one_node():
    arguments, _ = inputs_of("odd", torch.float32, True)
    with use_backend("native"):
        total, guidance = condition(*arguments, "native")
    assert FusedConditioning.__name__ in total.grad_fn.name()
    assert total.grad_fn is guidance.grad_fn


@needs_library
def test_what_absent_vectors_hold_does_not_matter():
    arguments, _ = inputs_of("odd", torch.float32, True)
    poisoned = list(arguments)
    poisoned[3] = torch.where(arguments[4][:, :, None], arguments[3], 1e30)
    with use_backend("native"):
        for ours, theirs in zip(condition(*poisoned, "native"), condition(*arguments, "native"), strict=True):
            assert torch.equal(ours, theirs)

"""The compiled GELU and its derivative against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmmae_kernels.gelu_linear.native import gelu_backward

# The exponential is off by 2 units of 2^-24, its argument by 1 times its size (at most 8 where it matters), the rest by
# about six roundings.
TOLERANCE = 16 * 2**-24
pytestmark = pytest.mark.usefixtures("library", "poisoned")


def by_hand(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.double()
    below = torch.special.erfc(-hidden / math.sqrt(2)) / 2
    density = torch.exp(-hidden.square() / 2) / math.sqrt(2 * math.pi)
    return grad.double() * (below + hidden * density), hidden * below


def assert_close(ours: Tensor, expected: Tensor, grad: Tensor | None = None) -> None:
    """Of a gradient, too, within what the derivative may err by near its zero, 4 * 2^-24, times `grad`."""
    assert ours.shape == expected.shape
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    cancelled = 0 if grad is None else 4 * 2**-24 * float(grad.double().norm())
    assert float((ours.double() - expected).norm()) <= max(TOLERANCE * float(expected.norm()), cancelled)


def test_every_tenth_thousandth_from_minus_fifteen_to_fifteen_is_right():
    hidden = torch.arange(-150_000, 150_001) / 10_000
    derivative, value = gelu_backward(torch.ones_like(hidden), hidden)
    expected_derivative, expected = by_hand(torch.ones_like(hidden), hidden)
    small = hidden.abs() < 4
    assert bool(((value - expected).abs() <= TOLERANCE * expected.abs())[small].all())
    assert float((value - expected).abs().max()) <= 2**-20  # a unit of the last place of 15
    assert bool(((derivative - expected_derivative).abs() <= 4 * 2**-24).all())


def test_the_tails_end_where_they_should():
    hidden = torch.tensor([-1e30, -100.0, -14.0, -0.0, 0.0, 14.0, 100.0, 1e30])
    derivative, value = gelu_backward(torch.ones(8), hidden)
    assert value.tolist() == [0, 0, 0, 0, 0, 14, 100, hidden[-1]]
    assert derivative.tolist() == [0, 0, 0, 0.5, 0.5, 1, 1, 1]
    derivative, value = gelu_backward(torch.ones(2), torch.tensor([math.nan, 1.0]))
    assert value.isnan().tolist() == derivative.isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (5, 0), (3, 65), (2, 63, 768), (2, 783, 1000), (2, 3, 5, 1025)])
def test_tensors_may_have_any_shape(shape):
    grad, hidden = torch.randn(shape), 2 * torch.randn(shape)
    for ours, expected, factor in zip(gelu_backward(grad, hidden), by_hand(grad, hidden), (grad, None), strict=True):
        assert_close(ours, expected, factor)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t.transpose(1, 2),
        lambda t: t[..., ::2],
        lambda t: t[:, 1:],
        lambda t: t[:1].expand(3, -1, -1),
        lambda t: t[..., :1].expand(-1, -1, 9),
        lambda t: t[0, 0, 0].expand(4, 5, 6),
    ],
)
def test_inputs_may_have_any_strides(change, inside):
    grad, hidden = (change(inside(tensor)) for tensor in torch.randn(2, 3, 33, 70))
    for ours, expected, factor in zip(gelu_backward(grad, hidden), by_hand(grad, hidden), (grad, None), strict=True):
        assert_close(ours, expected, factor)


@pytest.mark.parametrize("shape", [(97, 192), (7, 33)])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(on_threads, shape):
    grad, hidden = torch.randn(2, *shape)
    on_threads(1)
    expected = gelu_backward(grad, hidden)
    for threads in (1, 2, 3, *[2] * 100):
        on_threads(threads)
        assert all(map(torch.equal, gelu_backward(grad, hidden), expected))


def test_nothing_outside_the_outputs_is_written(library, guarded):
    grad, hidden = torch.randn(2, 3, 7, 1031)
    for threads in (1, 2):
        outs = guarded(3, 7, 1031), guarded(3, 7, 1031)
        library.gelu_backward(grad, hidden, *outs, threads)
        for ours, expected, factor in zip(outs, by_hand(grad, hidden), (grad, None), strict=True):
            assert_close(ours, expected, factor)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grad": torch.zeros(2, 3, 5)}, r"^grad: shape is \[2, 3, 5\], expected is \[2, 3, 4\]"),
        ({"grad": torch.zeros(2, 3, 4, dtype=torch.float16)}, r"^grad: dtype is float16, expected is float32"),
        ({"grad": torch.zeros(2, 4, 3).transpose(1, 2)}, r"^grad: strides are"),
        ({"hidden": torch.zeros(3, 4)}, r"^hidden: shape is \[3, 4\], expected is \[A, B, H\]"),
        ({"hidden": torch.zeros(2, 4, 3).transpose(1, 2)}, r"^hidden: strides are"),
        ({"grad_hidden": torch.zeros(2, 3, 5)}, r"^grad_hidden: shape is"),
        ({"activated": torch.zeros(2, 4, 3).transpose(1, 2)}, r"^activated: strides are"),
        ({"threads": 0}, r"^threads: 0 given"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(library, guarded, wrong, message):
    outs = {"grad_hidden": guarded(2, 3, 4), "activated": guarded(2, 3, 4)}
    with pytest.raises(ValueError, match=message):
        library.gelu_backward(
            **{"grad": torch.zeros(2, 3, 4), "hidden": torch.zeros(2, 3, 4), "threads": 2, **outs, **wrong}
        )
    assert all(bool(out.isnan().all()) for out in outs.values())


@pytest.mark.parametrize(
    "grad", [torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, device="meta")]
)
def test_the_function_refuses_what_does_not_fit(grad):
    with pytest.raises(ValueError, match=r"^grad "):
        gelu_backward(grad, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\[\.\.\., H\]"):
        gelu_backward(torch.tensor(0.0), torch.tensor(0.0))

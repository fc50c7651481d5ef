"""The compiled GELU and its gradient against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmmae_kernels.gelu_linear.cpu import gelu_backward, gelu_forward

# The exponential is off by 2 units of 2^-24, its argument by 1 times its size (at most 8 where it matters), the rest by
# about six roundings.
TOLERANCE = 16 * 2**-24
pytestmark = pytest.mark.usefixtures("library", "poisoned")


def by_hand(grad: Tensor, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    # The sum is taken in float32, like any GEMM's with a bias.
    hidden = (hidden if bias is None else hidden + bias).double()
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


def check(grad: Tensor, hidden: Tensor, bias: Tensor | None = None) -> None:
    by_hidden, by_activation = grad.clone(memory_format=torch.contiguous_format), grad.double()
    activated, by_bias = gelu_backward(by_hidden, hidden, bias)
    expected, expected_activated = by_hand(grad, hidden, bias)
    assert_close(by_hidden, expected, grad)
    assert_close(activated, expected_activated)
    assert torch.equal(gelu_forward(hidden, bias), activated)
    if bias is None:
        assert by_bias.numel() == 0
    else:  # of what is added up, whatever cancels
        assert by_bias.shape == bias.shape
        assert by_bias.is_contiguous()
        error = by_bias.double() - expected.flatten(0, -2).sum(0)
        assert float(error.norm()) <= TOLERANCE * float(by_activation.abs().flatten(0, -2).sum(0).norm())


def test_every_tenth_thousandth_from_minus_fifteen_to_fifteen_is_right():
    hidden = torch.arange(-150_000, 150_001) / 10_000
    derivative = torch.ones_like(hidden)
    value, _ = gelu_backward(derivative, hidden, None)
    expected_derivative, expected = by_hand(torch.ones_like(hidden), hidden)
    small = hidden.abs() < 4
    assert bool(((value - expected).abs() <= TOLERANCE * expected.abs())[small].all())
    assert float((value - expected).abs().max()) <= 2**-20  # a unit of the last place of 15
    assert bool(((derivative - expected_derivative).abs() <= 4 * 2**-24).all())


def test_the_tails_end_where_they_should():
    hidden = torch.tensor([-1e30, -100.0, -14.0, -0.0, 0.0, 14.0, 100.0, 1e30])
    derivative = torch.ones(8)
    value, _ = gelu_backward(derivative, hidden, None)
    assert value.tolist() == gelu_forward(hidden, None).tolist() == [0, 0, 0, 0, 0, 14, 100, hidden[-1]]
    assert derivative.tolist() == [0, 0, 0, 0.5, 0.5, 1, 1, 1]
    derivative = torch.ones(2)
    value, _ = gelu_backward(derivative, torch.tensor([math.nan, 1.0]), None)
    assert value.isnan().tolist() == derivative.isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 0), (0, 5), (3, 65), (2, 63, 768), (2, 783, 1000), (2, 3, 5, 1025)])
def test_tensors_may_have_any_shape(shape):
    grad, hidden = torch.randn(shape), 2 * torch.randn(shape)
    check(grad, hidden)
    if len(shape) > 1:
        check(grad, hidden, torch.randn(shape[-1]))


def test_a_single_row_has_one_axis_and_its_gradient_is_that_of_the_bias():
    grad, hidden, bias = torch.randn(3, 7)
    _, by_bias = gelu_backward(grad, hidden, bias)
    assert torch.equal(by_bias, grad)
    activated, by_bias = gelu_backward(torch.empty(0), torch.empty(0), torch.empty(0))
    assert activated.shape == by_bias.shape == (0,)


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
def test_hidden_may_have_any_strides(change, inside):
    hidden = change(inside(torch.randn(3, 33, 70)))
    check(torch.randn(hidden.shape), hidden, torch.randn(hidden.shape[-1], 2)[:, 1])


@pytest.mark.parametrize("shape", [(97, 192), (7, 33)])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(on_threads, shape):
    grad, hidden = torch.randn(2, *shape)
    bias = torch.randn(shape[-1])

    def run() -> list[Tensor]:
        by_hidden = grad.clone()
        return [by_hidden, *gelu_backward(by_hidden, hidden, bias), gelu_forward(hidden, bias)]

    on_threads(1)
    expected = run()
    for threads in (1, 2, 3, *[2] * 100):
        on_threads(threads)
        assert all(map(torch.equal, run(), expected))


def test_nothing_outside_the_outputs_is_written(library, guarded):
    grad, hidden = torch.randn(2, 3, 7, 1031)
    bias = torch.randn(1031)
    expected, expected_activated = by_hand(grad, hidden, bias)
    for threads in (1, 2):
        by_hidden, activated, by_bias, again = (guarded(*size) for size in [(3, 7, 1031)] * 2 + [(1031,), (3, 7, 1031)])
        by_hidden.copy_(grad)
        library.gelu_backward(by_hidden, hidden, bias, activated, by_bias, threads)
        library.gelu(hidden, bias, again, threads)
        assert_close(by_hidden, expected, grad)
        assert_close(activated, expected_activated)
        assert torch.equal(again, activated)
        assert not by_bias.isnan().any()


COLUMNS = torch.zeros(2, 4, 3).transpose(1, 2)
WRONG = [
    ({"hidden": torch.zeros(3, 4)}, r"^hidden: shape is \[3, 4\], expected is \[A, B, H\]"),
    ({"hidden": torch.zeros(2, 3, 4, dtype=torch.float16)}, r"^hidden: dtype is float16, expected is float32"),
    ({"hidden": COLUMNS}, r"^hidden: strides are"),
    ({"bias": torch.zeros(5)}, r"^bias: shape is \[5\], expected is \[4\]"),
    ({"bias": torch.zeros(8)[::2]}, r"^bias: strides are \[2\]"),
    ({"activated": COLUMNS}, r"^activated: strides are"),
    ({"activated": torch.zeros(2, 3, 5)}, r"^activated: shape is"),
    ({"threads": 0}, r"^threads: 0 given"),
]
WRONG_BACKWARD = [
    ({"grad": torch.zeros(2, 3, 5)}, r"^grad: shape is \[2, 3, 5\], expected is \[2, 3, 4\]"),
    ({"grad": COLUMNS}, r"^grad: strides are"),
    ({"bias": None}, r"^grad_bias: wanted with a bias, and only then"),
    ({"grad_bias": None}, r"^grad_bias: wanted with a bias, and only then"),
    ({"grad_bias": torch.zeros(5)}, r"^grad_bias: shape is"),
    ({"grad_bias": torch.zeros(8)[::2]}, r"^grad_bias: strides are"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_input_of_forward_is_refused_and_nothing_is_written(library, guarded, wrong, message):
    activated = guarded(2, 3, 4)
    right = {"hidden": torch.zeros(2, 3, 4), "bias": torch.zeros(4), "activated": activated, "threads": 2}
    with pytest.raises(ValueError, match=message):
        library.gelu(**{**right, **wrong})
    assert bool(activated.isnan().all())


@pytest.mark.parametrize(("wrong", "message"), WRONG + WRONG_BACKWARD, ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_input_of_backward_is_refused_and_nothing_is_written(library, guarded, wrong, message):
    outs = {"grad": guarded(2, 3, 4), "activated": guarded(2, 3, 4), "grad_bias": guarded(4)}
    right = {"hidden": torch.zeros(2, 3, 4), "bias": torch.zeros(4), "threads": 2}
    with pytest.raises(ValueError, match=message):
        library.gelu_backward(**{**right, **outs, **wrong})
    assert all(bool(out.isnan().all()) for out in outs.values())


@pytest.mark.parametrize(
    "grad", [torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, device="meta")]
)
def test_the_functions_refuse_what_does_not_fit(grad):
    with pytest.raises(ValueError, match=r"^grad "):
        gelu_backward(grad, torch.zeros(2, 4), None)
    with pytest.raises(ValueError, match=r"^grad has strides"):
        gelu_backward(torch.zeros(4, 2).t(), torch.zeros(2, 4), None)
    for call in (gelu_forward, lambda *given: gelu_backward(torch.tensor(0.0), *given)):
        with pytest.raises(ValueError, match=r"\[\.\.\., H\]"):
            call(torch.tensor(0.0), None)

"""The compiled GELU and its gradient against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmmae_kernels import gelu_linear, use_backend
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
    """Compare within a tolerance that allows the derivative an error of 4 * 2^-24 near its zero, times `grad`."""
    assert ours.shape == expected.shape
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    cancelled = 0 if grad is None else 4 * 2**-24 * float(grad.double().norm())
    assert float((ours.double() - expected).norm()) <= max(TOLERANCE * float(expected.norm()), cancelled)


def check(grad: Tensor, hidden: Tensor, bias: Tensor | None = None) -> None:
    by_hidden, by_activation = grad.clone(memory_format=torch.contiguous_format), grad.double()
    activated, by_bias = gelu_backward(by_hidden, hidden, bias, None)
    expected, expected_activated = by_hand(grad, hidden, bias)
    assert_close(by_hidden, expected, grad)
    assert_close(activated, expected_activated)
    assert torch.equal(gelu_forward(hidden, bias)[0], activated)
    if bias is None:
        assert by_bias is None
    else:  # of what is added up, whatever cancels
        assert by_bias.shape == bias.shape
        assert by_bias.is_contiguous()
        error = by_bias.double() - expected.flatten(0, -2).sum(0)
        assert float(error.norm()) <= TOLERANCE * float(by_activation.abs().flatten(0, -2).sum(0).norm())


def test_every_tenth_thousandth_from_minus_fifteen_to_fifteen_is_right():
    hidden = torch.arange(-150_000, 150_001) / 10_000
    derivative = torch.ones_like(hidden)
    value, _ = gelu_backward(derivative, hidden, None, None)
    expected_derivative, expected = by_hand(torch.ones_like(hidden), hidden)
    small = hidden.abs() < 4
    assert bool(((value - expected).abs() <= TOLERANCE * expected.abs())[small].all())
    assert float((value - expected).abs().max()) <= 2**-20  # a unit of the last place of 15
    assert bool(((derivative - expected_derivative).abs() <= 4 * 2**-24).all())


def test_the_tails_end_where_they_should():
    hidden = torch.tensor([-1e30, -100.0, -14.0, -0.0, 0.0, 14.0, 100.0, 1e30])
    derivative = torch.ones(8)
    value, _ = gelu_backward(derivative, hidden, None, None)
    assert value.tolist() == gelu_forward(hidden, None)[0].tolist() == [0, 0, 0, 0, 0, 14, 100, hidden[-1]]
    assert derivative.tolist() == [0, 0, 0, 0.5, 0.5, 1, 1, 1]
    derivative = torch.ones(2)
    value, _ = gelu_backward(derivative, torch.tensor([math.nan, 1.0]), None, None)
    assert value.isnan().tolist() == derivative.isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 0), (0, 5), (3, 65), (2, 63, 768), (2, 783, 1000), (2, 3, 5, 1025)])
def test_tensors_may_have_any_shape(shape):
    grad, hidden = torch.randn(shape), 2 * torch.randn(shape)
    check(grad, hidden)
    if len(shape) > 1:
        check(grad, hidden, torch.randn(shape[-1]))


def test_a_single_row_has_one_axis_and_its_gradient_is_that_of_the_bias():
    grad, hidden, bias = torch.randn(3, 7)
    _, by_bias = gelu_backward(grad, hidden, bias, None)
    assert torch.equal(by_bias, grad)
    activated, by_bias = gelu_backward(torch.empty(0), torch.empty(0), torch.empty(0), None)
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
        return [by_hidden, *gelu_backward(by_hidden, hidden, bias, None), gelu_forward(hidden, bias)[0]]

    on_threads(1)
    expected = run()
    for threads in (1, 2, 3, *[2] * 100):
        on_threads(threads)
        assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_outside_the_outputs_is_written(on_threads, guarded, guarded_allocations, threads):
    on_threads(threads)
    grad, hidden = torch.randn(2, 3, 7, 1031)
    bias = torch.randn(1031)
    expected, expected_activated = by_hand(grad, hidden, bias)
    by_hidden = guarded(3, 7, 1031).copy_(grad)
    activated, by_bias = gelu_backward(by_hidden, hidden, bias, None)
    assert_close(by_hidden, expected, grad)
    assert_close(activated, expected_activated)
    assert torch.equal(gelu_forward(hidden, bias)[0], activated)
    assert not by_bias.isnan().any()


def test_no_output_is_a_view_of_another_tensor():
    for hidden in (torch.randn(2, 3, 7), torch.randn(3, 2, 7).transpose(0, 1)):
        activated, grad_bias = gelu_backward(torch.randn(2, 3, 7), hidden, torch.randn(7), None)
        assert not any(output._is_view() for output in (activated, grad_bias, gelu_forward(hidden, None)[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default_dtype, dtype):
    grad, hidden, bias = torch.randn(2, 7, 33), torch.randn(2, 7, 33), torch.randn(33)
    default_dtype(dtype)
    check(grad, hidden, bias)


ROWS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": torch.tensor(0.0)}, r"hidden has shape \[\]"),
        ({"hidden": torch.zeros(2, 5)}, r"hidden has shape \[2, 5\]"),
        ({"hidden": ROWS.half()}, "float"),
        ({"hidden_bias": torch.zeros(5)}, r"hidden_bias has shape \[5\]"),
        ({"hidden_bias": torch.zeros(4, device="meta")}, "hidden_bias .*meta"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    right = {"hidden": ROWS, "weight": torch.zeros(5, 4), "bias": None, "hidden_bias": torch.zeros(4)}
    with use_backend("native"), pytest.raises(ValueError, match=message):
        gelu_linear(**{**right, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(2, 3),
        torch.ones(2, 4).double(),
        torch.ones(2, 4).half(),
        torch.ones(4, 2).t(),
        torch.ones(2, 8)[:, ::2],
    ],
    ids=["shape", "double", "half", "transposed", "strided"],
)
def test_a_gradient_that_can_not_be_written_to_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^grad is .* expected contiguous torch.float32 of shape \[2, 4\]"):
        gelu_backward(wrong, torch.zeros(2, 4), None, None)
    assert bool((wrong == 1).all())


def test_a_thread_count_below_one_is_refused(library):
    with pytest.raises(ValueError, match=r"^threads is 0, expected"):
        library.gelu(0, (0, 0), 0, 0, 0, (0, 0, 0), 0)
    with pytest.raises(ValueError, match=r"^threads is 0, expected"):
        library.gelu_backward(0, 0, (0, 0), 0, 0, 0, 0, (0, 0, 0), 0)

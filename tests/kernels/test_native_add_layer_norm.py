"""The compiled residual add and layer norm and their gradients against float64, on shapes and strides that hurt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmmae_kernels import add_layer_norm, use_backend
from mmmae_kernels.add_layer_norm.cpu import add_layer_norm_backward, add_layer_norm_forward

EPSILON = 1e-6
# Relative to what is added up: a number goes through a dozen roundings, sums are of 32 running sums or more.
TOLERANCE = 16 * 2**-24
pytestmark = pytest.mark.usefixtures("library", "poisoned")


def norm_by_hand(total: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = total.double()
    mean = total.mean(-1, keepdim=True)
    rstd = ((total - mean).square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return (total - mean) * rstd * weight.double() + bias.double(), mean.flatten(), rstd.flatten()


def gradients_by_hand(grad_total: Tensor | None, grad_norm: Tensor, total: Tensor, weight: Tensor) -> list[Tensor]:
    """Compute the gradients of x, weight and bias from the formula of the norm's derivative."""
    grad, total, weight = grad_norm.double(), total.double(), weight.double()
    centred = total - total.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    normalised, scaled = centred * rstd, grad * weight
    grad_x = rstd * (scaled - scaled.mean(-1, keepdim=True) - normalised * (scaled * normalised).mean(-1, keepdim=True))
    if grad_total is not None:
        grad_x = grad_x + grad_total.double()
    return [grad_x, (grad * normalised).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)]


def assert_close(ours: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
    assert ours.shape == expected.shape
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    scale = expected if scale is None else scale
    assert float((ours.double() - expected).norm()) <= TOLERANCE * float(scale.double().norm())


def check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, grad_total, grad_norm, shift=None) -> None:
    total, norm, statistics, none = add_layer_norm_forward(x, residual, shift, weight, bias, EPSILON, torch.float32)
    mean, rstd = statistics
    if residual is None:
        assert total is None
        total = x
    added = residual if shift is None else residual + shift
    assert torch.equal(total, x if residual is None else x + added)
    expected, expected_mean, expected_rstd = norm_by_hand(total, weight, bias)
    assert_close(norm, expected)
    assert_close(mean, expected_mean, total.double().abs().mean(-1))
    assert_close(rstd, expected_rstd)
    *gradients, no_sum, nothing, no_residual = add_layer_norm_backward(
        grad_total, grad_norm, total, weight, None, statistics, none, None, None
    )
    assert no_sum is nothing is no_residual is None
    rows = norm.flatten(0, -2)
    weight_scale = grad_norm.flatten(0, -2).abs().sum(0) * max(float(rows.abs().max()), 1) if rows.numel() else None
    bias_scale = grad_norm.flatten(0, -2).abs().sum(0)
    rstd_scale = float(rstd.max()) if rstd.numel() else 1.0
    input_scale = grad_norm.abs() * float(weight.abs().max()) * rstd_scale + (0 if grad_total is None else grad_total)
    scales = (input_scale, weight_scale, bias_scale)
    for ours, hand, scale in zip(
        gradients, gradients_by_hand(grad_total, grad_norm, total, weight), scales, strict=True
    ):
        assert_close(ours, hand, scale)
    *again, row_sum, recomputed, no_residual = add_layer_norm_backward(
        grad_total, grad_norm, total, weight, bias, statistics, none, torch.float32, torch.float32
    )
    assert no_residual is None
    assert all(map(torch.equal, again, gradients))
    by_rows = gradients[0].double().flatten(0, -2)
    assert_close(row_sum, by_rows.sum(0), by_rows.abs().sum(0))
    assert torch.equal(recomputed, norm)


def parameters(width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(width), torch.randn(width)


@pytest.mark.parametrize("width", [1, 64, 192, 768, 1000])
@pytest.mark.parametrize("tokens", [1, 7, 63, 65, 783])
def test_values_and_gradients_are_right(tokens, width):
    x, residual, grad_total, grad_norm = torch.randn(4, 2, tokens, width)
    check(x, residual, *parameters(width), grad_total, grad_norm)
    check(x, residual, *parameters(width), grad_total, grad_norm, torch.randn(width))
    check(x, None, *parameters(width), None, grad_norm)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 5, 7), (2, 1, 3, 2, 7)])
def test_tensors_may_have_any_number_of_axes(shape):
    x, residual, grad_total, grad_norm = torch.randn(4, *shape)
    check(x, residual, *parameters(7), grad_total, grad_norm)


def test_a_single_row_has_one_axis():
    x, residual, weight, bias = torch.randn(4, 7)
    total, norm, *saved = add_layer_norm_forward(x, residual, None, weight, bias, EPSILON, torch.float32)
    assert_close(norm, norm_by_hand(total, weight, bias)[0])
    grad_x, *_ = add_layer_norm_backward(None, x, total, weight, None, *saved, None, None)
    assert_close(grad_x, gradients_by_hand(None, x[None], total[None], weight)[0][0])


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 3, 0)])
def test_nothing_gives_nothing(shape):
    x = torch.empty(shape)
    weight, bias = parameters(shape[-1])
    total, norm, *saved = add_layer_norm_forward(x, x, None, weight, bias, EPSILON, torch.float32)
    assert total.shape == norm.shape == shape
    grad_x, grad_weight, grad_bias, row_sum, again, grad_residual = add_layer_norm_backward(
        x, x, total, weight, bias, *saved, torch.float32, torch.bfloat16
    )
    assert grad_x.shape == again.shape == grad_residual.shape == shape
    assert saved[0].shape == (2, shape[0] * shape[1])
    assert not grad_weight.any()
    assert not grad_bias.any()
    assert not row_sum.any()


def test_a_row_far_from_zero_keeps_what_its_numbers_hold():
    """Mean 1000, deviation 1: a variance taken as the difference of two means of squares would be off by a tenth."""
    x = torch.randn(1, 9, 768) + 1000
    weight, bias = torch.ones(768), torch.zeros(768)
    _, norm, (_, rstd), _ = add_layer_norm_forward(x, None, None, weight, bias, EPSILON, torch.float32)
    expected, _, expected_rstd = norm_by_hand(x, weight, bias)
    assert float((norm - expected).abs().max()) <= 1000 * 2**-22
    assert_close(rstd, expected_rstd)


STRIDES = {
    "inside NaN": None,
    "batch and tokens swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second channel": lambda t: t.repeat_interleave(2, -1)[..., 1::2],
    "without the first token": lambda t: torch.cat([t[:, :1], t], dim=1)[:, 1:],
    "one row expanded": lambda t: t[:, :1].expand(t.shape),
    "one sample expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", STRIDES)
def test_inputs_and_gradients_may_have_any_strides(inside, layout):
    change = STRIDES[layout] or inside
    x, residual, grad_total, grad_norm = (change(tensor) for tensor in torch.randn(4, 3, 65, 192))
    weight, bias = torch.randn(2, 192, 2)[..., 0] if layout == "every second channel" else parameters(192)
    check(x, residual, inside(weight), bias, grad_total, grad_norm, torch.randn(192, 2)[:, 1])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_gradient_that_is_one_number_expanded_is_right(value):
    x = torch.randn(2, 65, 300)
    weight, bias = parameters(300)
    grad = torch.tensor(value).expand(x.shape)
    total, _, *saved = add_layer_norm_forward(x, x, None, weight, bias, EPSILON, torch.float32)
    arguments = (total, weight, None, *saved, None, None)
    expected = add_layer_norm_backward(grad.clone(), grad.clone(), *arguments)[:3]
    assert all(map(torch.equal, add_layer_norm_backward(grad, grad, *arguments)[:3], expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_residual_is_that_of_x_in_another_dtype(dtype):
    x, grad = torch.randn(2, 3, 7, 33)
    weight, bias = parameters(33)
    total, _, *saved = add_layer_norm_forward(x, x, None, weight, bias, EPSILON, torch.float32)
    grad_x, *_, grad_residual = add_layer_norm_backward(grad, grad, total, weight, None, *saved, None, dtype)
    assert torch.equal(grad_residual, grad_x.to(dtype))


@pytest.mark.parametrize(("tokens", "width"), [(97, 192), (7, 33)])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(on_threads, tokens, width):
    x, residual, grad_total, grad_norm = torch.randn(4, 3, tokens, width)
    weight, bias = parameters(width)

    def run() -> list[Tensor]:
        outputs = add_layer_norm_forward(x, residual, bias, weight, bias, EPSILON, torch.float32)
        total, norm, *saved = outputs
        arguments = (grad_total, grad_norm, total, weight, bias, *saved, torch.float32, torch.bfloat16)
        return [total, norm, saved[0], *add_layer_norm_backward(*arguments)]

    on_threads(1)
    expected = run()
    for threads in (1, 2, 3, *[2] * 100):
        on_threads(threads)
        assert all(map(torch.equal, run(), expected))


def test_a_row_does_not_depend_on_where_it_starts():
    """Else a sample's last bits would depend on its place in the batch."""
    row, weight, bias = torch.randn(3, 101)
    results = []
    for start in range(16):
        buffer = torch.zeros(1, 120)
        buffer[:, start : start + 101] = row
        results.append(
            add_layer_norm_forward(buffer[:, start : start + 101], None, None, weight, bias, EPSILON, torch.float32)[1]
        )
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("guarded_allocations")
def test_nothing_outside_the_outputs_is_written(on_threads, threads):
    on_threads(threads)
    x, residual, grad_total, grad_norm = torch.randn(4, 3, 65, 200)
    check(x, residual, *parameters(200), grad_total, grad_norm, torch.randn(200))


def test_no_output_is_a_view_of_another_tensor():
    x = torch.randn(2, 3, 7)
    for some in (x, x.transpose(0, 1)):
        outputs = add_layer_norm_forward(some, some, None, *parameters(7), EPSILON, torch.float32)
        total, _, *saved = outputs
        grads = add_layer_norm_backward(some, some, total, *parameters(7), *saved, torch.float32, torch.bfloat16)
        assert not any(output._is_view() for output in (*outputs[:3], *grads))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default_dtype, dtype):
    x, residual, grad_total, grad_norm = torch.randn(4, 2, 7, 33)
    weight, bias = parameters(33)
    default_dtype(dtype)
    check(x, residual, weight, bias, grad_total, grad_norm, bias)


X, VECTOR = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": X.double()}, "float64"),
        ({"x": torch.zeros(())}, r"x has shape \[\]"),
        ({"residual": torch.zeros(2, 3, 5)}, r"residual has shape \[2, 3, 5\]"),
        ({"residual": X.double()}, "float64"),
        ({"residual": X.to("meta")}, "residual .*meta"),
        ({"residual": None}, "residual_bias"),
        ({"residual_bias": torch.zeros(5)}, r"residual_bias has shape \[5\]"),
        ({"weight": torch.zeros(5)}, r"weight has shape \[5\]"),
        ({"weight": VECTOR.to("meta")}, "weight .*meta"),
        ({"bias": torch.zeros(4, 1)}, r"bias has shape \[4, 1\]"),
        ({"bias": VECTOR.half()}, "float16"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    right = {"x": X, "residual": X, "weight": VECTOR, "bias": VECTOR, "epsilon": EPSILON, "residual_bias": VECTOR}
    with use_backend("native"), pytest.raises(ValueError, match=message):
        add_layer_norm(*{**right, **wrong}.values())


def test_a_thread_count_below_one_is_refused(library):
    none = (0, 0)
    with pytest.raises(ValueError, match=r"^threads is 0, expected"):
        library.add_layer_norm(0, none, 0, none, 0, 0, 0, EPSILON, 0, 0, 0, 0, (0,) * 4, (0, 0, 0), 0)
    with pytest.raises(ValueError, match=r"^threads is 0, expected"):
        library.add_layer_norm_backward(0, none, 0, none, 0, none, *(0,) * 10, (0,) * 4, (0, 0, 0), 0)

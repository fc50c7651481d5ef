"""The compiled residual add and layer norm and their gradients against float64, on shapes and strides that hurt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
    """The gradients of x, weight and bias, from the definition of the derivative of the norm."""
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
    total, norm, mean, rstd = add_layer_norm_forward(x, residual, shift, weight, bias, EPSILON, torch.float32)
    if residual is None:
        assert total.numel() == 0
        total = x
    added = residual if shift is None else residual + shift
    assert torch.equal(total, x if residual is None else x + added)
    expected, expected_mean, expected_rstd = norm_by_hand(total, weight, bias)
    assert_close(norm, expected)
    assert_close(mean, expected_mean, total.double().abs().mean(-1))
    assert_close(rstd, expected_rstd)
    *gradients, no_sum, nothing = add_layer_norm_backward(grad_total, grad_norm, total, weight, None, mean, rstd, None)
    assert no_sum.numel() == nothing.numel() == 0
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
    *again, row_sum, recomputed = add_layer_norm_backward(
        grad_total, grad_norm, total, weight, bias, mean, rstd, torch.float32
    )
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
    total, norm, mean, rstd = add_layer_norm_forward(x, residual, None, weight, bias, EPSILON, torch.float32)
    assert_close(norm, norm_by_hand(total, weight, bias)[0])
    grad_x, *_ = add_layer_norm_backward(None, x, total, weight, None, mean, rstd, None)
    assert_close(grad_x, gradients_by_hand(None, x[None], total[None], weight)[0][0])


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7)])
def test_nothing_gives_nothing(shape):
    x = torch.empty(shape)
    weight, bias = parameters(7)
    total, norm, mean, rstd = add_layer_norm_forward(x, x, None, weight, bias, EPSILON, torch.float32)
    assert total.shape == norm.shape == shape
    grad_x, grad_weight, grad_bias, row_sum, again = add_layer_norm_backward(
        x, x, total, weight, bias, mean, rstd, torch.float32
    )
    assert grad_x.shape == again.shape == shape
    assert not grad_weight.any()
    assert not grad_bias.any()
    assert not row_sum.any()


def test_a_row_far_from_zero_keeps_what_its_numbers_hold():
    """Mean 1000, deviation 1: a variance taken as the difference of two means of squares would be off by a tenth."""
    x = torch.randn(1, 9, 768) + 1000
    weight, bias = torch.ones(768), torch.zeros(768)
    _, norm, _, rstd = add_layer_norm_forward(x, None, None, weight, bias, EPSILON, torch.float32)
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
    total, _, mean, rstd = add_layer_norm_forward(x, x, None, weight, bias, EPSILON, torch.float32)
    expected = add_layer_norm_backward(grad.clone(), grad.clone(), total, weight, None, mean, rstd, None)[:3]
    assert all(
        map(torch.equal, add_layer_norm_backward(grad, grad, total, weight, None, mean, rstd, None)[:3], expected)
    )


@pytest.mark.parametrize(("tokens", "width"), [(97, 192), (7, 33)])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(on_threads, tokens, width):
    x, residual, grad_total, grad_norm = torch.randn(4, 3, tokens, width)
    weight, bias = parameters(width)

    def run() -> list[Tensor]:
        outputs = add_layer_norm_forward(x, residual, bias, weight, bias, EPSILON, torch.float32)
        total, _, *statistics = outputs
        arguments = (grad_total, grad_norm, total, weight, bias, *statistics, torch.float32)
        return [*outputs, *add_layer_norm_backward(*arguments)]

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


def test_nothing_outside_the_outputs_is_written(library, guarded):
    x, residual, grad_total, grad_norm = torch.randn(4, 3, 65, 200)
    weight, bias = parameters(200)
    for threads in (1, 2):
        outs = {"total": guarded(3, 65, 200), "norm": guarded(3, 65, 200), "mean": guarded(195), "rstd": guarded(195)}
        library.add_layer_norm(x, residual, bias, weight, bias, EPSILON, **outs, threads=threads)
        total, norm, mean, rstd = outs.values()
        assert_close(norm, norm_by_hand(x + (residual + bias), weight, bias)[0])
        outs = {"grad_x": guarded(3, 65, 200), "grad_weight": guarded(200), "grad_bias": guarded(200)}
        outs["row_sum"] = guarded(200)
        again = guarded(3, 65, 200)
        library.add_layer_norm_backward(
            grad_total, grad_norm, total, weight, bias, mean, rstd, **outs, norm=again, threads=threads
        )
        assert torch.equal(again, norm)
        assert not any(out.isnan().any() for out in outs.values())


def right_forward() -> dict:
    x, residual, total, norm = torch.ones(4, 2, 3, 4)
    return {
        **{"x": x, "residual": residual, "residual_bias": torch.ones(4), "epsilon": EPSILON},
        **{"weight": torch.ones(4), "bias": torch.ones(4)},
        **{"total": total, "norm": norm, "mean": torch.ones(6), "rstd": torch.ones(6), "threads": 2},
    }


def right_backward() -> dict:
    grad_total, grad_norm, total, grad_x = torch.ones(4, 2, 3, 4)
    return {
        **{"grad_total": grad_total, "grad_norm": grad_norm, "total": total, "weight": torch.ones(4), "bias": None},
        **{"mean": torch.ones(6), "rstd": torch.ones(6), "grad_x": grad_x, "grad_weight": torch.ones(4)},
        **{"grad_bias": torch.ones(4), "row_sum": torch.ones(4), "norm": None, "threads": 2},
    }


COLUMNS = torch.zeros(2, 4, 3).transpose(1, 2)
WRONG_FORWARD = [
    ({"x": torch.zeros(2, 3, 4, dtype=torch.float64)}, r"^x: dtype is float64, expected is float32"),
    ({"x": torch.zeros(3, 4)}, r"^x: shape is \[3, 4\], expected is \[A, B, D\]"),
    ({"x": COLUMNS}, r"^x: strides are"),
    ({"residual": torch.zeros(2, 3, 5)}, r"^residual: shape is \[2, 3, 5\], expected is \[2, 3, 4\]"),
    ({"residual": COLUMNS}, r"^residual: strides are"),
    ({"residual": None}, r"^total: wanted with a residual, and only then"),
    ({"residual": None, "total": None}, r"^residual_bias: without a residual"),
    ({"residual_bias": torch.zeros(5)}, r"^residual_bias: shape is \[5\], expected is \[4\]"),
    ({"residual_bias": torch.zeros(8)[::2]}, r"^residual_bias: strides are \[2\]"),
    ({"total": None}, r"^total: wanted with a residual, and only then"),
    ({"total": COLUMNS}, r"^total: strides are"),
    ({"total": torch.zeros(2, 3, 5)}, r"^total: shape is"),
    ({"weight": torch.zeros(5)}, r"^weight: shape is \[5\], expected is \[4\]"),
    ({"bias": torch.zeros(8)[::2]}, r"^bias: strides are \[2\]"),
    ({"norm": torch.zeros(2, 3, 5)}, r"^norm: shape is"),
    ({"norm": COLUMNS}, r"^norm: strides are"),
    ({"mean": torch.zeros(5)}, r"^mean: shape is \[5\], expected is \[6\]"),
    ({"rstd": torch.zeros(12)[::2]}, r"^rstd: strides are \[2\]"),
    ({"threads": 0}, r"^threads: 0 given"),
]
WRONG_BACKWARD = [
    ({"grad_norm": torch.zeros(2, 3, 5)}, r"^grad_norm: shape is \[2, 3, 5\], expected is \[2, 3, 4\]"),
    ({"grad_norm": COLUMNS}, r"^grad_norm: strides are"),
    ({"grad_total": torch.zeros(2, 3, 5)}, r"^grad_total: shape is"),
    ({"grad_total": COLUMNS}, r"^grad_total: strides are"),
    ({"grad_total": torch.zeros(2, 3, 4, dtype=torch.bfloat16)}, r"^grad_total: dtype is bfloat16"),
    ({"total": COLUMNS}, r"^total: strides are"),
    ({"weight": torch.zeros(5)}, r"^weight: shape is"),
    ({"bias": torch.zeros(4)}, r"^norm: wanted with a bias, and only then"),
    ({"norm": torch.zeros(2, 3, 4)}, r"^norm: wanted with a bias, and only then"),
    ({"bias": torch.zeros(5), "norm": torch.zeros(2, 3, 4)}, r"^bias: shape is"),
    ({"bias": torch.zeros(4), "norm": torch.zeros(2, 3, 5)}, r"^norm: shape is"),
    ({"mean": torch.zeros(7)}, r"^mean: shape is"),
    ({"rstd": torch.zeros(7)}, r"^rstd: shape is"),
    ({"grad_x": torch.zeros(2, 3, 5)}, r"^grad_x: shape is"),
    ({"grad_x": COLUMNS}, r"^grad_x: strides are"),
    ({"grad_weight": torch.zeros(5)}, r"^grad_weight: shape is"),
    ({"grad_bias": torch.zeros(8)[::2]}, r"^grad_bias: strides are"),
    ({"row_sum": torch.zeros(5)}, r"^row_sum: shape is"),
    ({"row_sum": torch.zeros(8)[::2]}, r"^row_sum: strides are"),
    ({"threads": 0}, r"^threads: 0 given"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_FORWARD, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_inputs_are_refused_and_nothing_is_written(library, wrong, message):
    right = right_forward()
    with pytest.raises(ValueError, match=message):
        library.add_layer_norm(**{**right, **wrong})
    assert all(bool((right[name] == 1).all()) for name in ("total", "norm", "mean", "rstd"))


@pytest.mark.parametrize(("wrong", "message"), WRONG_BACKWARD, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_gradients_are_refused_and_nothing_is_written(library, wrong, message):
    right = right_backward()
    with pytest.raises(ValueError, match=message):
        library.add_layer_norm_backward(**{**right, **wrong})
    assert all(bool((right[name] == 1).all()) for name in ("grad_x", "grad_weight", "grad_bias", "row_sum"))


def test_the_functions_refuse_what_does_not_fit():
    x, weight = torch.ones(2, 3, 4), torch.ones(4)
    for wrong in (torch.ones(2, 3, 5), x.double(), x.to("meta")):
        with pytest.raises(ValueError, match="residual"):
            add_layer_norm_forward(x, wrong, None, weight, weight, EPSILON, torch.float32)
        with pytest.raises(ValueError, match="grad_norm"):
            add_layer_norm_backward(None, wrong, x, weight, None, torch.ones(6), torch.ones(6), None)
    with pytest.raises(ValueError, match=r"\[\.\.\., D\]"):
        add_layer_norm_forward(torch.tensor(1.0), None, None, weight, weight, EPSILON, torch.float32)
    with pytest.raises(ValueError, match="meta"):
        add_layer_norm_forward(x, None, None, weight.to("meta"), weight, EPSILON, torch.float32)

"""The compiled masked losses and their gradients against float64, on ids, weights and strides that hurt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmmae_kernels import masked_l2_loss, patch_l2_loss, use_backend
from mmmae_kernels.masked_loss import cpu
from mmmae_kernels.masked_loss.cpu import (
    CHUNK_ROWS,
    masked_l2_loss_forward,
    patch_l2_loss_forward,
)
from mmmae_kernels.masked_loss.reference import NORMALIZE_EPSILON

# All terms of a loss are positive: of the errors of running sums, 64 or more a row, few units of 2^-24 remain. A target
# that is normalised, or that a GEMM computes, brings as much again.
TOLERANCE = 16 * 2**-24
pytestmark = pytest.mark.usefixtures("library", "poisoned")


def by_hand(
    prediction: Tensor, target: Tensor, ids: Tensor | None, weights: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Compute the loss and its gradient in float64, sample by sample."""
    prediction, target = prediction.double(), target.double()
    if ids is not None:
        target = torch.stack([sample[numbers] for sample, numbers in zip(target, ids, strict=True)])
    if normalize:
        width = target.shape[-1]
        target = target - target.mean(-1, keepdim=True)
        target = target / (target.pow(2).sum(-1, keepdim=True) / max(width - 1, 1) + NORMALIZE_EPSILON).sqrt()
    weights = torch.ones(prediction.shape[:2]) if weights is None else weights
    weights, total = weights.double(), float(weights.double().sum()) or 1.0
    difference = prediction - target
    loss = (difference.pow(2).mean(-1) * weights).sum() / total
    return loss, 2 * weights[..., None] / (prediction.shape[-1] * total) * difference


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == expected.shape
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert float((ours.double() - expected).norm()) <= tolerance * float(expected.norm())


def check(prediction, target, ids, weights, normalize) -> None:
    loss, gradient = masked_l2_loss_forward(prediction, target, ids, weights, normalize, True)
    expected, expected_gradient = by_hand(prediction, target, ids, weights, normalize)
    assert_close(loss, expected)
    assert_close(gradient, expected_gradient)
    alone, nothing = masked_l2_loss_forward(prediction, target, ids, weights, normalize, False)
    assert torch.equal(alone, loss)
    assert nothing.numel() == 0


def inputs(batch: int, tokens: int, masked: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(batch, tokens).argsort(1)[:, :masked]
    return torch.randn(batch, masked, width), 3 * torch.randn(batch, tokens, width) + 1, ids


WEIGHTS = {
    "none": lambda *shape: None,
    "float": lambda *shape: torch.rand(shape),
    "bool": lambda *shape: torch.rand(shape) < 0.5,
    "int": lambda *shape: torch.randint(0, 3, shape),
    "double": lambda *shape: torch.rand(shape, dtype=torch.float64),
    "expanded": lambda *shape: torch.rand(shape[0], 1).expand(shape),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("width", [1, 64, 192, 768, 1000])
@pytest.mark.parametrize("tokens", [1, 7, 63, 65, 783])
def test_loss_and_gradient_are_right(tokens, width, normalize):
    prediction, target, ids = inputs(2, tokens, (3 * tokens + 3) // 4, width)
    check(prediction, target, ids, None, normalize)
    check(prediction, target[:, : ids.shape[1]], None, torch.rand(ids.shape) + 0.1, normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_may_be_of_any_type(kind, normalize):
    prediction, target, ids = inputs(3, 65, 40, 70)
    check(prediction, target, ids, WEIGHTS[kind](3, 40), normalize)
    volume, weight, bias = patches(3)
    check_patches(prediction[:, :30], volume, weight, bias, ids_of(3, 30), WEIGHTS[kind](3, 30), normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("batch", "masked"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_costs_nothing(batch, masked, normalize):
    prediction, target, ids = inputs(batch, 7, masked, 9)
    loss, gradient = masked_l2_loss_forward(prediction, target, ids, None, normalize, True)
    assert float(loss) == 0
    assert gradient.shape == prediction.shape
    volume, weight, _ = patches(batch)
    loss, gradient = patch_l2_loss_forward(
        torch.randn(batch, masked, 70), volume, weight, None, ids_of(batch, masked), None, normalize, True
    )
    assert float(loss) == 0
    assert gradient.shape == (batch, masked, 70)


@pytest.mark.parametrize("normalize", [False, True])
def test_weights_that_are_all_zero_cost_nothing(normalize):
    prediction, target, ids = inputs(2, 7, 5, 9)
    weights = torch.zeros(2, 5, dtype=torch.bool)
    loss, gradient = masked_l2_loss_forward(prediction, target, ids, weights, normalize, True)
    assert float(loss) == 0
    assert not gradient.any()
    volume, weight, bias = patches(2)
    loss, gradient = patch_l2_loss_forward(
        torch.randn(2, 5, 70), volume, weight, bias, ids_of(2, 5), weights, normalize, True
    )
    assert float(loss) == 0
    assert not gradient.any()


def test_a_target_far_from_zero_is_normalised_as_exactly_as_its_mean_allows():
    """The mean of 768 numbers near 1000 is off by some units of 2^-24 times 1000, as much of the deviation 1."""
    prediction, target, ids = inputs(2, 9, 5, 768)
    target = torch.randn_like(target) + 1000
    loss, _ = masked_l2_loss_forward(prediction, target, ids, None, True, False)
    assert_close(loss, by_hand(prediction, target, ids, None, True)[0], tolerance=1000 * TOLERANCE)


STRIDES = {
    "inside NaN": None,
    "batch and tokens swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second channel": lambda t: t.repeat_interleave(2, -1)[..., 1::2],
    "one row expanded": lambda t: t[:, :1].expand(t.shape),
    "one channel expanded": lambda t: t[..., :1].expand(t.shape),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", STRIDES)
def test_inputs_may_have_any_strides(inside, layout, normalize):
    if normalize and layout == "one channel expanded":
        pytest.skip("a target of equal channels is rounding errors over 1e-3")
    change = STRIDES[layout] or inside
    prediction, target, ids = inputs(3, 65, 40, 192)
    weights = change(torch.rand(3, 40, 1))[..., 0] if layout == "inside NaN" else torch.rand(40, 3).t()
    check(change(prediction), change(target), inside(ids), weights, normalize)
    volume, weight, bias = patches(3, width=192)
    check_patches(
        change(prediction[:, :30]), inside(volume), weight, inside(bias), inside(ids_of(3, 30)), None, normalize
    )


def patches(batch: int, channels: int = 2, width: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    """Return a volume of 4 x 4 x 6 = 96 patches, and weight and bias of their embedding."""
    volume = torch.randn(batch, channels, 8, 16, 24)
    return volume, torch.randn(width, channels, 2, 4, 4) / 8, torch.randn(width)


def ids_of(batch: int, masked: int) -> Tensor:
    return torch.rand(batch, 96).argsort(1)[:, :masked]


def embed_by_hand(volume: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.double()
    embedded = torch.nn.functional.conv3d(volume.double(), weight.double(), bias, stride=weight.shape[2:])
    return embedded.flatten(2).transpose(1, 2)


def check_patches(prediction, volume, weight, bias, ids, weights, normalize) -> None:
    loss, gradient = patch_l2_loss_forward(prediction, volume, weight, bias, ids, weights, normalize, True)
    expected, expected_gradient = by_hand(prediction, embed_by_hand(volume, weight, bias), ids, weights, normalize)
    assert_close(loss, expected)
    assert_close(gradient, expected_gradient)
    alone, nothing = patch_l2_loss_forward(prediction, volume, weight, bias, ids, weights, normalize, False)
    assert torch.equal(alone, loss)
    assert nothing.numel() == 0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_patch_loss_and_gradient_are_right(dtype, has_bias, normalize):
    volume, weight, bias = patches(3)
    volume = volume if dtype == torch.float32 else (volume * 30 + 90).to(dtype)
    weight = weight if dtype == torch.float32 else weight / 30
    check_patches(
        torch.randn(3, 30, 70), volume, weight, bias if has_bias else None, ids_of(3, 30), torch.rand(3, 30), normalize
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("batch", "masked"), [(1, 1), (1, 96), (9, 96), (2, CHUNK_ROWS + 1), (41, 30)])
def test_patch_loss_is_right_however_its_rows_are_cut_into_chunks(batch, masked, normalize):
    volume, weight, bias = patches(batch)
    ids = torch.randint(0, 96, (batch, masked))
    check_patches(torch.randn(batch, masked, 70), volume, weight, bias, ids, torch.rand(batch, masked), normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("masked", "width"), [(97, 192), (5, 33)])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(on_threads, masked, width, normalize):
    prediction, target, ids = inputs(3, 100, masked, width)
    weights = torch.rand(3, masked)

    def run() -> list[Tensor]:
        return list(masked_l2_loss_forward(prediction, target, ids, weights, normalize, True))

    on_threads(1)
    expected = run()
    for threads in (1, 2, 3, *[2] * 100):
        on_threads(threads)
        assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_row_does_not_depend_on_where_it_starts(monkeypatch, normalize):
    """Else a sample's last bits would depend on its place in the batch."""
    row = torch.randn(2, 101)
    results, loss_of_target = set(), cpu._loss_of_target

    def record(*arguments):
        results.add(loss_of_target(*arguments))
        return 0.0

    monkeypatch.setattr(cpu, "_loss_of_target", record)
    for start in range(16):
        buffer = torch.zeros(2, 120)
        buffer[:, start : start + 101] = row
        prediction, target = buffer[:, None, start : start + 101]
        masked_l2_loss_forward(prediction[None], target[None], None, None, normalize, False)
    assert len(results) == 1


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("guarded_allocations")
def test_nothing_outside_the_output_is_written(on_threads, threads, normalize):
    on_threads(threads)
    prediction, target, ids = inputs(3, 65, 40, 300)
    check(prediction, target, ids, torch.rand(3, 40), normalize)
    volume, weight, bias = patches(3, width=300)
    check_patches(prediction, volume, weight, bias, ids, torch.rand(3, 40), normalize)


def test_no_output_is_a_view_of_another_tensor():
    prediction, target, ids = inputs(3, 65, 40, 70)
    outputs = masked_l2_loss_forward(prediction, target, ids, None, True, True)
    volume, weight, bias = patches(3)
    outputs += patch_l2_loss_forward(prediction, volume, weight, bias, ids, None, False, True)
    assert not any(output._is_view() for output in outputs)


@pytest.mark.parametrize("shape", [(0, 5, 0), (2, 0, 0), (2, 5, 0), (0, 5, 3)])
def test_sizes_of_zero_give_what_pytorch_gives(shape):
    losses = []
    for backend in ("native", "eager"):
        with use_backend(backend):
            losses.append(masked_l2_loss(torch.zeros(shape), torch.zeros(shape)))
    torch.testing.assert_close(*losses, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default_dtype, dtype):
    prediction, target, ids = inputs(2, 9, 5, 33)
    default_dtype(dtype)
    check(prediction, target, ids, None, True)


TARGET = torch.zeros(2, 6, 5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prediction": torch.zeros(2, 4, 5, dtype=torch.float64)}, "prediction .*float64"),
        ({"prediction": torch.zeros(4, 5)}, r"prediction has shape \[4, 5\]"),
        ({"target": torch.zeros(2, 6, 4)}, r"prediction has shape \[2, 4, 5\], .*\[2, 4, 4\]"),
        ({"target": torch.zeros(3, 6, 5)}, r"prediction has shape \[2, 4, 5\], .*\[3, 4, 5\]"),
        ({"target": TARGET.to("meta")}, "target .*meta"),
        ({"ids": None}, r"prediction has shape \[2, 4, 5\], .*\[2, 6, 5\]"),
        ({"ids": torch.zeros(2, 4, dtype=torch.int32)}, "ids .*int32"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, r"ids has shape \[2, 3\]"),
        ({"ids": torch.full((2, 4), 6)}, "ids contains 6"),
        ({"weights": torch.zeros(4, 2)}, r"weights has shape \[4, 2\]"),
        ({"weights": torch.zeros(2, 4, device="meta")}, "weights .*meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused(wrong, message):
    prediction, target, ids = inputs(2, 6, 4, 5)
    right = {"prediction": prediction, "target": target, "ids": ids, "weights": torch.rand(2, 4)}
    with use_backend("native"), pytest.raises(ValueError, match=message):
        masked_l2_loss(**{**right, **wrong})


@pytest.mark.parametrize("wrong", [6, -1])
def test_ids_out_of_range_are_refused_and_nothing_is_written(guarded_allocations, wrong):
    prediction, target, ids = inputs(2, 6, 4, 5)
    ids[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"^ids\[1, 2\] is {wrong}, expected 0\.\.5"):
        masked_l2_loss_forward(prediction, target, ids, None, False, True)
    (gradient,) = guarded_allocations
    assert bool(gradient.isnan().all())


def test_a_thread_count_below_one_is_refused(library):
    none = (0, 0)
    with pytest.raises(ValueError, match=r"^threads is 0, expected"):
        library.masked_l2_loss(0, none, 0, none, 0, none, 0, none, None, 1.0, 0, (0, 0, 0), (0, 0, 0, 0), 0)
    with pytest.raises(ValueError, match=r"^threads is -1, expected"):
        library.l2_loss_of_difference(0, 0, 0, none, 1.0, (0, 0, 0), -1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prediction": torch.zeros(2, 5, 69)}, r"prediction has shape \[2, 5, 69\]"),
        ({"prediction": torch.zeros(2, 5, 70, dtype=torch.float64)}, "prediction .*float64"),
        ({"prediction": torch.zeros(2, 5, 70, device="meta")}, "prediction .*meta"),
        ({"volume": torch.zeros(2, 3, 8, 16, 24)}, "volume has 3 channels"),
        ({"volume": torch.zeros(3, 2, 8, 16, 24)}, r"ids has shape \[2, 5\]"),
        ({"volume": torch.zeros(2, 2, 8, 16, 25)}, "volume has W = 25"),
        ({"volume": torch.zeros(2, 2, 8, 16, 24, dtype=torch.float64)}, "volume .*float64"),
        ({"volume": torch.zeros(2, 2, 8, 16, 24, device="meta")}, "meta"),
        ({"weight": torch.zeros(70, 32)}, r"weight has shape \[70, 32\]"),
        ({"weight": torch.zeros(70, 2, 2, 4, 4, dtype=torch.float16)}, "float16"),
        ({"bias": torch.zeros(69)}, r"bias has shape \[69\]"),
        ({"ids": torch.full((2, 5), 96)}, "ids contains 96"),
        ({"ids": torch.zeros(2, 5)}, "ids .*float32"),
        ({"ids": torch.tensor(3)}, r"ids has shape \[\]"),
        ({"weights": torch.zeros(2, 6)}, r"weights has shape \[2, 6\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_patches_are_refused(wrong, message):
    volume, weight, bias = patches(2)
    right = {"prediction": torch.zeros(2, 5, 70), "volume": volume, "weight": weight, "bias": bias}
    right |= {"ids": ids_of(2, 5), "weights": None}
    with use_backend("native"), pytest.raises(ValueError, match=message):
        patch_l2_loss(**{**right, **wrong})

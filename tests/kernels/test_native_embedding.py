"""The patch embedding of the compiled library, forward and all four gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmmae_kernels.patch_embed.cpu import patch_embed_backward, patch_embed_forward

# A GEMM of up to 200 products, and sums of at most 32 running sums: their roundings hardly ever add up.
TOLERANCE = 16 * 2**-24
pytestmark = pytest.mark.usefixtures("library", "poisoned")
PATCH, TOKENS = (2, 4, 4), 96
ALL = (True, True, True, True)


def inputs(
    batch: int, keep: int | None, width: int = 70, channels: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """A volume of 4 x 4 x 6 = 96 patches, weight, bias, ids and position."""
    volume = torch.randn(batch, channels, 8, 16, 24)
    weight = torch.randn(width, channels, *PATCH) / 6
    ids = None if keep is None else torch.rand(batch, TOKENS).argsort(1)[:, :keep]
    return volume, weight, torch.randn(width), ids, torch.randn(TOKENS, width)


def rows_by_hand(volume: Tensor, ids: Tensor | None) -> Tensor:
    """`[B, K, C*pt*ph*pw]`, cut patch by patch."""
    pt, ph, pw = PATCH
    samples = []
    for b, sample in enumerate(volume.double()):
        numbers = range(TOKENS) if ids is None else ids[b].tolist()
        rows = [sample[:, n // 24 * pt :, n // 6 % 4 * ph :, n % 6 * pw :][:, :pt, :ph, :pw].flatten() for n in numbers]
        samples.append(torch.stack(rows) if rows else sample.new_empty(0, sample.shape[0] * pt * ph * pw))
    return torch.stack(samples) if samples else volume.new_empty(0, 0 if ids is None else ids.shape[1], 64).double()


def forward_by_hand(volume, weight, bias, ids, position) -> Tensor:
    tokens = rows_by_hand(volume, ids) @ weight.double().flatten(1).t()
    tokens = tokens if bias is None else tokens + bias
    return tokens if position is None else tokens + (position if ids is None else position[ids])


def backward_by_hand(grad: Tensor, volume: Tensor, weight: Tensor, ids: Tensor | None) -> list[Tensor]:
    grad = grad.double()
    grad_volume, grad_position = torch.zeros_like(volume, dtype=torch.float64), grad.new_zeros(TOKENS, grad.shape[2])
    pt, ph, pw = PATCH
    for b in range(grad.shape[0]):
        for k in range(grad.shape[1]):
            n = k if ids is None else int(ids[b, k])
            corner = grad_volume[b, :, n // 24 * pt :, n // 6 % 4 * ph :, n % 6 * pw :]
            corner[:, :pt, :ph, :pw] += torch.einsum("d,dcijk->cijk", grad[b, k], weight.double())
            grad_position[n] += grad[b, k]
    rows = rows_by_hand(volume, ids)
    grad_weight = torch.einsum("bkd,bke->de", grad, rows).view(weight.shape)
    return [grad_volume, grad_weight, grad.sum((0, 1)), grad_position]


def assert_close(ours: Tensor, expected: Tensor, magnitude: Tensor | None = None) -> None:
    assert ours.shape == expected.shape
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    scale = float((expected if magnitude is None else magnitude).norm())
    assert float((ours.double() - expected).norm()) <= TOLERANCE * scale


def assert_gradients(grad, volume, weight, ids, needs=ALL) -> None:
    gradients = patch_embed_backward(grad, volume, weight, ids, needs)
    expected = backward_by_hand(grad, volume, weight, ids)
    magnitudes = backward_by_hand(grad.abs(), volume.abs(), weight.abs(), ids)
    for ours, hand, magnitude, wanted in zip(gradients, expected, magnitudes, needs, strict=True):
        assert (ours is not None) == wanted
        if wanted:
            assert_close(ours, hand, magnitude)


@pytest.mark.parametrize("width", [1, 64, 192])
@pytest.mark.parametrize(("batch", "keep"), [(3, None), (1, 1), (3, 7), (2, 63), (2, 96), (0, 5), (2, 0)])
def test_values_and_gradients_are_right(batch, keep, width):
    volume, weight, bias, ids, position = inputs(batch, keep, width)
    for some_bias in (None, bias):
        for some_position in (None, position):
            ours = patch_embed_forward(volume, weight, some_bias, ids, some_position)
            assert_close(ours, forward_by_hand(volume, weight, some_bias, ids, some_position))
    assert_gradients(torch.randn(batch, TOKENS if keep is None else keep, width), volume, weight, ids)


@pytest.mark.parametrize("needs", [tuple(bool(number >> bit & 1) for bit in range(4)) for number in range(16)])
def test_only_the_gradients_asked_for_are_computed(needs):
    volume, weight, _, ids, _ = inputs(2, 20)
    assert_gradients(torch.randn(2, 20, 70), volume, weight, ids, needs)


def test_a_repeated_id_gets_the_sum_in_order_and_one_never_named_gets_zero():
    volume, weight, _, _, _ = inputs(2, 3)
    ids = torch.tensor([[5, 0, 5], [5, 1, 1]])
    grad = torch.randn(2, 3, 70) * 10.0 ** torch.randint(-3, 4, (2, 3, 1))
    position = patch_embed_backward(grad, volume, weight, ids, (False, False, False, True))[3]
    assert torch.equal(position[5], grad[0, 0] + grad[0, 2] + grad[1, 0])
    assert torch.equal(position[1], grad[1, 1] + grad[1, 2])
    assert not position[6:].any()
    assert_gradients(grad, volume, weight, ids)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_an_integer_volume_is_embedded_as_its_numbers(dtype):
    volume, weight, bias, ids, position = inputs(2, 20)
    info = torch.iinfo(dtype)
    volume = torch.randint(info.min, info.max + 1, volume.shape, dtype=dtype)
    volume.view(-1)[:2] = torch.tensor([info.min, info.max], dtype=dtype)
    for some in (volume, volume.transpose(3, 4).contiguous().transpose(3, 4), volume[:1].expand(volume.shape)):
        ours = patch_embed_forward(some, weight, bias, ids, position)
        expected = forward_by_hand(some, weight, bias, ids, position)
        assert_close(ours, expected, some.double().norm() * weight.double().norm())
        assert_gradients(torch.randn(2, 20, 70), some, weight, ids, (False, True, True, True))
    with pytest.raises(ValueError, match="which has no gradient"):
        patch_embed_backward(torch.randn(2, 20, 70), volume, weight, ids, ALL)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda t: t.repeat_interleave(2, -1)[..., 1::2],
        lambda t: t[:1].expand(t.shape),
        lambda t: t[..., :1].expand(t.shape),
        lambda t: t.flatten()[0].expand(t.shape),
    ],
)
def test_inputs_and_gradients_may_have_any_strides(inside, change):
    volume, weight, bias, ids, position = inputs(3, 20)
    position, ids, weight = change(position), inside(ids), inside(weight)
    for some in (change(volume), inside(volume)):
        ours = patch_embed_forward(some, weight, inside(bias), ids, position)
        assert_close(ours, forward_by_hand(some, weight, bias, ids, position))
    for grad in (change(torch.randn(3, 20, 70)), inside(torch.randn(3, 20, 70))):
        assert_gradients(grad, volume, weight, ids)
        assert_gradients(grad, volume, weight, ids, (False, False, True, False))


@pytest.mark.parametrize(("keep", "width"), [(96, 192), (5, 33)])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(on_threads, library, keep, width):
    tokens, grad, position = torch.randn(5, keep, width), torch.randn(5, keep, width), torch.randn(TOKENS, width)
    ids = torch.randint(0, TOKENS, (5, keep))
    added = tokens + position[ids]
    results = []
    for threads in (1, 2, 3, *[2] * 100):
        outs = [torch.empty(TOKENS, width), torch.empty(width), torch.empty(width)]
        library.embedding_gradients(grad, ids, outs[0], outs[1], threads)
        library.sum_of_rows(grad, outs[2], threads)
        results.append(outs)
        out = tokens.clone()
        library.add_position(out, ids, position, threads)
        assert torch.equal(out, added)
    assert all(torch.equal(*pair) for outs in results for pair in zip(outs, results[0], strict=True))


def test_nothing_outside_the_outputs_is_written(library, guarded):
    grad, ids, position = torch.randn(3, 60, 200), torch.randint(0, TOKENS, (3, 60)), torch.randn(TOKENS, 200)
    for threads in (1, 2):
        tokens = guarded(3, 60, 200).copy_(grad)
        library.add_position(tokens, ids, position, threads)
        assert torch.equal(tokens, grad + position[ids])
        outs = guarded(TOKENS, 200), guarded(200), guarded(200)
        library.embedding_gradients(grad, ids, outs[0], outs[1], threads)
        library.sum_of_rows(grad, outs[2], threads)
        assert not any(out.isnan().any() for out in outs)
        library.embedding_gradients(grad, ids, outs[0], None, threads)


def refuse(function, right: dict, wrong: dict, message: str, outputs: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=message):
        function(**{**right, **wrong})
    assert all(bool((right[name] == 7).all()) for name in outputs)


IDS = torch.zeros(2, 3, dtype=torch.int64)
WRONG_IDS = [
    ({"ids": torch.zeros(2, 3, dtype=torch.int32)}, r"^ids: dtype is int32"),
    ({"ids": torch.zeros(2, 4, dtype=torch.int64)}, r"^ids: shape is \[2, 4\], expected is \[2, 3\]"),
    ({"ids": torch.full((2, 3), 5)}, r"^ids: 5 at \[0, 0\] is outside 0\.\.4"),
    ({"ids": torch.full((2, 3), -1)}, r"^ids: -1 at \[0, 0\] is outside 0\.\.4"),
    ({"threads": 0}, r"^threads: 0 given"),
]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *WRONG_IDS,
        ({"position": torch.zeros(5, 3)}, r"^position: shape is \[5, 3\], expected is \[5, 4\]"),
        ({"position": torch.zeros(4, 5).t()}, r"^position: strides are"),
        ({"position": torch.zeros(5, 4, dtype=torch.float64)}, r"^position: dtype is float64"),
        ({"tokens": torch.zeros(2, 4, 3).transpose(1, 2)}, r"^tokens: strides are"),
    ],
)
def test_a_wrong_position_is_refused_and_nothing_is_written(library, wrong, message):
    right = {"tokens": torch.full((2, 3, 4), 7.0), "ids": IDS, "position": torch.ones(5, 4), "threads": 2}
    refuse(library.add_position, right, wrong, message, ("tokens",))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *WRONG_IDS,
        ({"grad": torch.zeros(2, 3, 4, dtype=torch.float64)}, r"^grad: dtype is float64"),
        ({"grad": torch.zeros(2, 4, 3).transpose(1, 2)}, r"^grad: strides are"),
        ({"grad_position": torch.zeros(5, 3)}, r"^grad_position: shape is \[5, 3\], expected is \[5, 4\]"),
        ({"grad_position": torch.zeros(4, 5).t()}, r"^grad_position: strides are"),
        ({"grad_bias": torch.zeros(3)}, r"^grad_bias: shape is \[3\], expected is \[4\]"),
        ({"grad_bias": torch.zeros(8)[::2]}, r"^grad_bias: strides are"),
    ],
)
def test_wrong_gradients_are_refused_and_nothing_is_written(library, wrong, message):
    right = {"grad": torch.ones(2, 3, 4), "ids": IDS, "threads": 2}
    right |= {"grad_position": torch.full((5, 4), 7.0), "grad_bias": torch.full((4,), 7.0)}
    refuse(library.embedding_gradients, right, wrong, message, ("grad_position", "grad_bias"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grad": torch.zeros(2, 3, 4, dtype=torch.float64)}, r"^grad: dtype is float64"),
        ({"grad": torch.zeros(2, 4, 3).transpose(1, 2)}, r"^grad: strides are"),
        ({"out": torch.zeros(3)}, r"^out: shape is \[3\], expected is \[4\]"),
        ({"out": torch.zeros(8)[::2]}, r"^out: strides are"),
        ({"threads": 0}, r"^threads: 0 given"),
    ],
)
def test_wrong_sums_are_refused_and_nothing_is_written(library, wrong, message):
    right = {"grad": torch.ones(2, 3, 4), "out": torch.full((4,), 7.0), "threads": 2}
    refuse(library.sum_of_rows, right, wrong, message, ("out",))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"volume": torch.zeros(2, 2, 8, 16, 24, dtype=torch.float64)},
            "volume: dtype is float64, expected is float32",
        ),
        ({"volume": torch.zeros(2, 2, 8, 16, 25)}, "volume: W is 25"),
        ({"volume": torch.zeros(2, 3, 8, 16, 24)}, "weight has shape"),
        ({"volume": torch.zeros(2, 2, 8, 16, 24, device="meta")}, "volume lies on meta"),
        ({"weight": torch.zeros(70, 2, 2, 4)}, "weight has shape"),
        ({"weight": torch.zeros(70, 2, 2, 0, 4)}, "weight has shape"),
        ({"weight": torch.zeros(70, 2, 2, 4, 4, dtype=torch.float64)}, "weight is torch.float64"),
        ({"bias": torch.zeros(69)}, "bias has shape"),
        ({"ids": torch.full((2, 20), 96)}, "ids: 96 at"),
        ({"ids": torch.zeros(3, 20, dtype=torch.int64)}, "ids: shape is"),
        ({"ids": torch.zeros(20, dtype=torch.int64)}, "ids: shape is"),
        ({"ids": torch.zeros(2, 20, dtype=torch.int64, device="meta")}, "lies on meta"),
        ({"position": torch.zeros(95, 70)}, "position has shape"),
        ({"position": torch.zeros(96, 70, dtype=torch.bfloat16)}, "position is torch.bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(wrong, message):
    names = ("volume", "weight", "bias", "ids", "position")
    arguments = {**dict(zip(names, inputs(2, 20), strict=True)), **wrong}
    with pytest.raises(ValueError, match=message):
        patch_embed_forward(**arguments)
    if not wrong.keys() & {"bias", "position"}:
        del arguments["bias"], arguments["position"]
        with pytest.raises(ValueError, match="grad has shape" if arguments["ids"].shape != (2, 20) else message):
            patch_embed_backward(torch.zeros(2, 20, 70), **arguments, needs=(False, True, True, True))

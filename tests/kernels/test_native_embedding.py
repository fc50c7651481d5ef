"""The patch embedding of the compiled library, forward and all four gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmmae_kernels import patch_embed, use_backend
from mmmae_kernels.patch_embed.cpu import patch_embed_backward, patch_embed_forward

# A GEMM of up to 200 products, and sums of at most 32 running sums: their roundings hardly ever add up.
TOLERANCE = 16 * 2**-24
pytestmark = pytest.mark.usefixtures("library", "poisoned")
PATCH, TOKENS = (2, 4, 4), 96
ALL = (True, True, True, True)


def inputs(
    batch: int, keep: int | None, width: int = 70, channels: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Return a volume of 4 x 4 x 6 = 96 patches, weight, bias, ids and position."""
    volume = torch.randn(batch, channels, 8, 16, 24)
    weight = torch.randn(width, channels, *PATCH) / 6
    ids = None if keep is None else torch.rand(batch, TOKENS).argsort(1)[:, :keep]
    return volume, weight, torch.randn(width), ids, torch.randn(TOKENS, width)


def rows_by_hand(volume: Tensor, ids: Tensor | None) -> Tensor:
    """Return the patches `[B, K, C*pt*ph*pw]`, cut one by one."""
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
def test_results_are_the_same_for_any_number_of_threads_and_every_time(on_threads, keep, width):
    volume, weight, _, _, position = inputs(5, None, width)
    grad, ids = torch.randn(5, keep, width), torch.randint(0, TOKENS, (5, keep))

    def run() -> list[Tensor]:
        _, _, grad_bias, grad_position = patch_embed_backward(grad, volume, weight, ids, (False, False, True, True))
        _, _, alone, _ = patch_embed_backward(grad, volume, weight, ids, (False, False, True, False))
        return [grad_bias, grad_position, alone]

    on_threads(1)
    expected = run()
    for threads in (1, 2, 3, *[2] * 100):
        on_threads(threads)
        assert all(map(torch.equal, run(), expected))
        tokens = patch_embed_forward(volume, weight, None, ids, None)
        assert torch.equal(patch_embed_forward(volume, weight, None, ids, position), tokens + position[ids])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("guarded_allocations")
def test_nothing_outside_the_outputs_is_written(on_threads, threads):
    on_threads(threads)
    volume, weight, bias, _, position = inputs(3, None, 200)
    ids = torch.randint(0, TOKENS, (3, 60))
    ours = patch_embed_forward(volume, weight, bias, ids, position)
    assert_close(ours, forward_by_hand(volume, weight, bias, ids, position))
    for needs in (ALL, (False, False, True, False), (False, False, False, True)):
        assert_gradients(torch.randn(3, 60, 200), volume, weight, ids, needs)


def test_no_output_is_a_view_of_another_tensor():
    volume, weight, bias, ids, position = inputs(3, 20)
    for some_ids in (ids, None):
        tokens = patch_embed_forward(volume, weight, bias, some_ids, position)
        outputs = (tokens, *patch_embed_backward(tokens, volume, weight, some_ids, ALL))
        assert not any(output._is_view() for output in outputs)


@pytest.mark.parametrize(
    ("channels", "bands", "width"), [(0, 8, 70), (2, 0, 70), (2, 8, 0)], ids=["channels", "bands", "width"]
)
def test_sizes_of_zero_give_what_pytorch_gives(channels, bands, width):
    tokens = bands * 12
    volume, weight = torch.randn(2, channels, bands, 16, 24), torch.randn(width, channels, *PATCH)
    bias, position = torch.randn(width), torch.randn(tokens, width)
    tensors = [tensor.requires_grad_() for tensor in (volume, weight, bias, position)]
    results = []
    for backend in ("native", "eager"):
        with use_backend(backend):
            out = patch_embed(volume, weight, bias, None, position)
            results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"volume": torch.zeros(2, 2, 8, 16, 24, dtype=torch.float64)}, "volume .*float64"),
        ({"volume": torch.zeros(2, 2, 8, 16, 24, dtype=torch.bool)}, "volume .*bool"),
        ({"volume": torch.zeros(2, 2, 8, 16, 25)}, "volume has W = 25"),
        ({"volume": torch.zeros(2, 3, 8, 16, 24)}, "volume has 3 channels"),
        ({"volume": torch.zeros(2, 2, 8, 16, 24, device="meta")}, "meta"),
        ({"weight": torch.zeros(70, 2, 2, 4)}, r"weight has shape \[70, 2, 2, 4\]"),
        ({"weight": torch.zeros(70, 2, 2, 0, 4)}, "patch|weight"),
        ({"weight": torch.zeros(70, 2, 2, 4, 4, dtype=torch.float64)}, "float64"),
        ({"bias": torch.zeros(69)}, r"bias has shape \[69\]"),
        ({"ids": torch.full((2, 20), 96)}, "ids contains 96"),
        ({"ids": torch.zeros(2, 20, dtype=torch.int32)}, "ids .*int32"),
        ({"ids": torch.zeros(3, 20, dtype=torch.int64)}, r"ids has shape \[3, 20\]"),
        ({"ids": torch.zeros(20, dtype=torch.int64)}, r"ids has shape \[20\]"),
        ({"ids": torch.zeros(2, 20, dtype=torch.int64, device="meta")}, "ids .*meta"),
        ({"position": torch.zeros(95, 70)}, r"position has shape \[95, 70\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused(wrong, message):
    names = ("volume", "weight", "bias", "ids", "position")
    arguments = {**dict(zip(names, inputs(2, 20), strict=True)), **wrong}
    with use_backend("native"), pytest.raises(ValueError, match=message):
        patch_embed(**arguments)


@pytest.mark.parametrize("wrong", [96, -1])
def test_ids_out_of_range_are_refused_and_nothing_is_written(guarded_allocations, wrong):
    volume, weight, bias, ids, position = inputs(2, 20)
    ids[1, 4] = wrong
    message = rf"^ids\[1, 4\] is {wrong}, expected 0\.\.95"
    with pytest.raises(ValueError, match=message):
        patch_embed_forward(volume, weight, bias, ids, position)
    for needs in ((True, False, False, False), (False, True, False, False), (False, False, True, True)):
        with pytest.raises(ValueError, match=message):
            patch_embed_backward(torch.zeros(2, 20, 70), volume, weight, ids, needs)
    assert len(guarded_allocations) == 4  # twice the rows of patches, and the gradients of position and bias
    assert all(bool(output.isnan().all()) for output in guarded_allocations)


def test_ids_of_a_position_are_checked_too(library):
    """In its own right: whoever adds a position must have named rows that it has."""
    tokens, position = torch.full((1, 2, 4), 7.0), torch.ones(5, 4)
    for wrong in (5, -1):
        ids = torch.tensor([[0, wrong]])
        with pytest.raises(ValueError, match=rf"^ids\[0, 1\] is {wrong}, expected 0\.\.4"):
            library.add_position(
                *(tokens.data_ptr(), ids.data_ptr(), ids.stride(), position.data_ptr(), 4, tokens.data_ptr()),
                *((0, 0, 0), (1, 2, 4), 5, 1),
            )
    assert bool((tokens == 7).all())


def test_a_thread_count_below_one_is_refused(library):
    none, sizes = (0, 0), (0, 0, 0)
    for function, arguments in (
        (library.add_position, (0, 0, none, 0, 0, 0, sizes, sizes, 0)),
        (library.embedding_gradients, (0, none, 0, none, 0, 0, 0, sizes, 0)),
        (library.sum_of_rows, (0, none, 0, 0, sizes)),
    ):
        with pytest.raises(ValueError, match=r"^threads is 0, expected"):
            function(*arguments, 0)

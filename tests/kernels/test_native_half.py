"""The native kernels on rows of bfloat16 and float16: conversions bit by bit, strides, threads, and memory outside.

tests/kernels/test_equality_of_ops.py compares their results with float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmmae_kernels.add_layer_norm.cpu import add_layer_norm_backward, add_layer_norm_forward
from mmmae_kernels.decoder_tokens.cpu import decoder_tokens_backward, decoder_tokens_forward
from mmmae_kernels.gelu_linear.cpu import gelu_backward, gelu_forward
from mmmae_kernels.linear import sum_rows
from mmmae_kernels.masked_loss.cpu import masked_l2_loss_forward, patch_l2_loss_forward
from mmmae_kernels.patch_embed.cpu import (
    gather_patches,
    gather_rows,
    patch_embed_backward,
    patch_embed_forward,
    scatter_patches,
)

HALVES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("library", "poisoned")

Change = Callable[[Tensor], Tensor]


def convert(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert numbers by the kernel, as a patch of a single line."""
    out = torch.empty(numbers.numel(), dtype=dtype)
    gather_rows(numbers[None, None, None, None], (1, 1, numbers.numel()), torch.zeros(1, 1, dtype=torch.int64), out)
    return out


def assert_same_bits(ours: Tensor, expected: Tensor) -> None:
    integers = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert torch.equal(ours.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(ours[numbers].view(integers), expected[numbers].view(integers))


@pytest.mark.parametrize("dtype", HALVES)
def test_all_numbers_are_widened_exactly(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same_bits(convert(numbers, torch.float32), numbers.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_are_rounded_as_torch_rounds_them(dtype):
    """All numbers of the dtype, what lies halfway between two, and next to that; and numbers of any bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    step = every.view(torch.int32)
    near = [step + (half + more) for half in (2**12, 2**15) for more in (-1, 0, 1)]
    anything = torch.randint(-(2**31), 2**31 - 1, (100_000,)).to(torch.int32)
    limits = torch.tensor([0.0, -0.0, 65519.0, 65520.0, -65520.0, 3.4e38, 2.0**-25, 2.0**-24, 1.5 * 2.0**-25, 1e-40])
    numbers = torch.cat([every, *[bits.view(torch.float32) for bits in (*near, anything)], limits])
    assert_same_bits(convert(numbers, dtype), numbers.to(dtype))


@pytest.mark.parametrize("source", [torch.float32, torch.int16, torch.uint8, *HALVES])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_patches_are_gathered_in_any_dtype(source, dtype):
    volume = torch.randint(0, 200, (2, 1, 2, 6, 32)).to(source)
    ids = torch.tensor([[0, 5, 3], [2, 2, 1]])
    out = torch.empty(6, 64, dtype=dtype)
    for some in (volume, volume.transpose(3, 4).contiguous().transpose(3, 4)):
        gather_rows(some, (2, 2, 16), ids, out)
        rows = volume.view(2, 2, 3, 2, 2, 16).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 64)
        expected = torch.stack([rows[b, ids[b]] for b in range(2)]).view(6, 64)
        assert torch.equal(out, expected.to(dtype))


def draws(count: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    return [draw.to(dtype) for draw in torch.randn(count, *shape)]


def run_add_layer_norm(change: Change, half: torch.dtype, shape: tuple[int, int, int]) -> list[Tensor | None]:
    results: list[Tensor | None] = []
    for stream, vectors in ((torch.float32, torch.float32), (half, half)):
        weight, bias, shift = draws(3, shape[2], dtype=vectors)
        x, grad_total = map(change, draws(2, *shape, dtype=stream))
        residual, grad_norm = map(change, draws(2, *shape, dtype=half))
        total, norm, *saved = add_layer_norm_forward(x, residual, shift, weight, bias, 1e-6, half)
        grads = add_layer_norm_backward(grad_total, grad_norm, change(total), weight, bias, *saved, vectors, half)
        alone = add_layer_norm_forward(x, None, None, weight, bias, 1e-6, half)
        results += [total, norm, saved[0], *grads, alone[1]]
    return results


def run_gelu(change: Change, half: torch.dtype, shape: tuple[int, int, int]) -> list[Tensor | None]:
    hidden, grad = draws(2, *shape, dtype=half)
    hidden = change(hidden)
    results: list[Tensor | None] = []
    for bias in (None, torch.randn(shape[2]), torch.randn(shape[2]).to(half)):
        changed = grad.clone()
        results += [gelu_forward(hidden, bias)[0], *gelu_backward(changed, hidden, bias, None), changed]
    return results


def run_decoder_tokens(change: Change, half: torch.dtype, shape: tuple[int, int, int]) -> list[Tensor | None]:
    batch, tokens, width = shape
    keep = tokens // 4
    visible, grad = (change(*draws(1, batch, count, width, dtype=half)) for count in (keep, tokens))
    permuted = torch.stack([torch.randperm(tokens) for _ in range(batch)]) if batch else torch.empty(0, tokens).long()
    results: list[Tensor | None] = []
    for ids in (permuted, permuted // 2):  # the second one names some rows twice, and others not at all
        for position in draws(1, tokens, width, dtype=half) + draws(1, tokens, width, dtype=torch.float32):
            results.append(decoder_tokens_forward(visible, torch.randn(width), ids, position))
        results += decoder_tokens_backward(grad, ids, keep)
    return results


def run_masked_loss(change: Change, half: torch.dtype, shape: tuple[int, int, int]) -> list[Tensor | None]:
    prediction, target = map(change, draws(2, *shape, dtype=half))
    ids = torch.randint(0, max(shape[1], 1), shape[:2])
    weights = torch.rand(shape[:2]).to(half)
    results: list[Tensor | None] = []
    for normalize in (False, True):
        results += masked_l2_loss_forward(prediction, target, ids, weights, normalize, True)
        results += masked_l2_loss_forward(prediction, target.float(), None, None, normalize, True)
    return results


def run_patches(change: Change, half: torch.dtype, shape: tuple[int, int, int]) -> list[Tensor | None]:
    batch, tokens, width = shape
    volume = torch.randn(batch, 1, 2, 4, 4 * tokens)
    ids = torch.randint(0, max(tokens, 1), (batch, tokens // 2 + 1 if tokens else 0))
    weight, bias = torch.randn(width, 1, 2, 4, 4).to(half), torch.randn(width)
    prediction, grad = (change(*draws(1, *ids.shape, width, dtype=half)) for _ in range(2))
    results: list[Tensor | None] = []
    for some in (volume, volume.to(half)):
        for position in (None, torch.randn(tokens, width), torch.randn(tokens, width).to(half)):
            results.append(patch_embed_forward(some, weight, bias, ids, position))
        for needs in ((True, True, True, True), (False, False, True, False)):
            results += patch_embed_backward(grad, some, weight, ids, needs)
        for normalize in (False, True):
            results += patch_l2_loss_forward(prediction, some, weight, bias, ids, None, normalize, True)
    if width:
        rows = gather_patches(volume.to(half), ids, (2, 4, 4))
        results += [rows, scatter_patches(change(rows), ids, (2, 4, 4), tuple(volume.shape))]
    return results


OPS = {
    "add_layer_norm": run_add_layer_norm,
    "gelu": run_gelu,
    "decoder_tokens": run_decoder_tokens,
    "masked_l2_loss": run_masked_loss,
    "patches": run_patches,
}
every_op = pytest.mark.parametrize("op", OPS)
every_half = pytest.mark.parametrize("half", HALVES)
STRIDES: dict[str, Change] = {
    "batch and tokens swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second channel": lambda t: t.repeat_interleave(2, -1)[..., 1::2],
    "one row expanded": lambda t: t[:, :1].expand(t.shape),
    "one sample expanded": lambda t: t[:1].expand(t.shape),
}


def run(op: str, half: torch.dtype, shape: tuple[int, int, int], change: Change = lambda t: t) -> list[Tensor]:
    torch.manual_seed(0)
    return [result for result in OPS[op](change, half, shape) if result is not None]


def assert_all_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for place, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), place


@every_op
@every_half
@pytest.mark.parametrize("layout", STRIDES)
def test_strides_do_not_matter(op, half, layout):
    change, shape = STRIDES[layout], (3, 20, 41)
    assert_all_same(run(op, half, shape, change), run(op, half, shape, lambda tensor: change(tensor).clone()))


@every_op
@every_half
def test_numbers_beside_the_inputs_are_not_read(op, half, inside):
    assert all(bool(result.isfinite().all()) for result in run(op, half, (3, 20, 41), inside))


@every_op
@every_half
def test_results_are_the_same_for_any_number_of_threads(on_threads, op, half):
    on_threads(1)
    expected = run(op, half, (3, 65, 171))
    for threads in (2, 3):
        on_threads(threads)
        assert_all_same(run(op, half, (3, 65, 171)), expected)


@every_op
@every_half
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_outside_the_outputs_is_written(on_threads, request, op, half, threads):
    on_threads(threads)
    expected = run(op, half, (3, 65, 171))
    request.getfixturevalue("guarded_allocations")
    assert_all_same(run(op, half, (3, 65, 171)), expected)


@every_op
@every_half
@pytest.mark.parametrize("shape", [(0, 8, 16), (2, 0, 16), (2, 8, 0)])
def test_nothing_gives_nothing(op, half, shape):
    for result in run(op, half, shape):
        assert result.numel() == 0 or not result.nan_to_num().any()


@every_half
def test_the_statistics_are_those_of_the_sum_as_it_is_stored(half):
    """Backward has nothing else."""
    x, residual = draws(2, 1, 9, 768, dtype=half)
    total, _, (mean, rstd), _ = add_layer_norm_forward(x, residual, None, *draws(2, 768, dtype=half), 1e-6, half)
    total = total.double()
    assert float((mean - total.mean(-1)).abs().max()) <= 2**-24 * float(total.abs().mean())
    assert float((rstd * (total.var(-1, correction=0) + 1e-6).sqrt() - 1).abs().max()) <= 8 * 2**-24


@every_half
def test_the_gradient_of_a_residual_may_have_a_wider_dtype_than_that_of_x(half):
    x, grad_norm = draws(2, 1, 9, 40, dtype=half)
    weight, bias = torch.randn(2, 40)
    _, _, *saved = add_layer_norm_forward(x, None, None, weight, bias, 1e-6, half)
    grad_x, *_, grad_residual = add_layer_norm_backward(None, grad_norm, x, weight, None, *saved, None, torch.float32)
    assert grad_residual.dtype == torch.float32
    assert torch.equal(grad_residual.to(half), grad_x)


@every_half
@pytest.mark.parametrize("layout", ["as they come", "channels first", "one row expanded"])
def test_rows_are_added_up_in_float32(monkeypatch, half, layout):
    """A sum in half precision would stop growing at 512 or 4096."""
    rows = STRIDES.get(layout, lambda tensor: tensor)(torch.rand(1, 20_000, 33).to(half))[0]
    expected = rows.double().sum(0)
    monkeypatch.setattr(Tensor, "sum", None)
    total = sum_rows(rows, torch.float32)
    assert total.dtype == torch.float32
    assert float((total / expected - 1).abs().max()) <= 2**-20

"""The compiled attention and its gradients against float64."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmmae_kernels.attention.backends import native
from mmmae_kernels.attention.backends.native import HEAD_WIDTH_LIMIT, attention_backward, attention_forward

# A score is off by about sqrt(d) roundings, at most 16 * 2^-24 of numbers near one, its exponential by 2 more.
# Two sums follow, three for the gradients of queries and keys: 1e-5 holds for scores of a few units.
TOLERANCE = 1e-5
LEVELS = ("avx512", "avx2", "plain")
pytestmark = pytest.mark.usefixtures("library", "poisoned")


def numbers(batch: int, queries: int, keys: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a gradient, queries, keys and values."""
    grad, q = torch.randn(2, batch, queries, heads, width)
    k, v = torch.randn(2, batch, keys, heads, width)
    return grad, q, k, v


class Exact(NamedTuple):
    value: Tensor
    cancelled: float = 0  # the norm of what cancels in it


def by_hand(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None = None) -> list[Exact]:
    """Compute out, lse and the gradients of q, k and v in float64."""
    grad, q, k, v = (tensor.double() for tensor in (grad, q, k, v))
    if key_present is not None:
        gone = ~key_present[:, :, None, None]
        k, v = k.masked_fill(gone, 0), v.masked_fill(gone, 0)
    scale = 1 / math.sqrt(q.shape[-1])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if key_present is not None:
        scores = scores.masked_fill(~key_present[:, None, None], -math.inf)
    lse = scores.logsumexp(-1)
    share = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    out = torch.einsum("bhqk,bkhd->bqhd", share, v)
    delta = (grad * out).sum(-1).transpose(1, 2)[..., None]
    grad_scores = share * (torch.einsum("bqhd,bkhd->bhqk", grad, v) - delta) * scale
    parts = share * (torch.einsum("bqhd,bkhd->bhqk", grad.abs(), v.abs()) + delta.abs()) * scale
    of_q, of_k = "bhqk,bkhd->bqhd", "bhqk,bqhd->bkhd"
    return [
        Exact(out),
        Exact(lse),
        Exact(torch.einsum(of_q, grad_scores, k), float(torch.einsum(of_q, parts, k.abs()).norm())),
        Exact(torch.einsum(of_k, grad_scores, q), float(torch.einsum(of_k, parts, q.abs()).norm())),
        Exact(torch.einsum(of_k, share, grad)),
    ]


def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None = None) -> list[Tensor]:
    out, lse = attention_forward(q, k, v, key_present)
    grads = [torch.empty(tensor.shape) for tensor in (q, k, v)]
    attention_backward(grad, (q, k, v), key_present, out, lse, grads)
    return [out, lse, *grads]


def assert_close(ours: list[Tensor], expected: list[Exact]) -> None:
    """Compare relative to each norm, or within 4 roundings of the terms that cancel (with one key, all of them)."""
    for mine, (exact, cancelled) in zip(ours, expected, strict=True):
        assert mine.shape == exact.shape
        assert mine.dtype == torch.float32
        assert torch.equal(mine.isinf(), exact.isinf())
        error = (mine.double() - exact).masked_fill(exact.isinf(), 0)
        norm = exact.masked_fill(exact.isinf(), 0).norm()
        assert float(error.norm()) <= max(TOLERANCE * float(norm), 4 * 2**-24 * cancelled)


@pytest.mark.parametrize("tokens", [0, 1, 7, 63, 65, 196, 784])
def test_a_sequence_may_have_any_length(tokens):
    case = numbers(2, tokens, tokens, 2, 64)
    assert_close(run(*case), by_hand(*case))


@pytest.mark.parametrize(
    ("queries", "keys"),
    [(0, 5), (5, 0), (1, 300), (300, 1), (588, 784), (119, 513), (121, 1031), (240, 127), (33, 2049)],
)
def test_queries_and_keys_may_differ_in_number(queries, keys):
    case = numbers(1, queries, keys, 2, 24)
    assert_close(run(*case), by_hand(*case))


@pytest.mark.parametrize("width", [1, 2, 7, 16, 17, 32, 33, 48, 64, 80, 96, 112, 128, 144, 200, HEAD_WIDTH_LIMIT])
def test_heads_may_have_any_width(width):
    case = numbers(2, 63, 65, 3, width)
    assert_close(run(*case), by_hand(*case))


@pytest.mark.parametrize(("batch", "heads"), [(0, 3), (3, 0), (1, 1), (5, 7)])
def test_there_may_be_any_number_of_samples_and_heads(batch, heads):
    case = numbers(batch, 9, 11, heads, 8)
    assert_close(run(*case), by_hand(*case))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [1, 7, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 33), (65, 63), (130, 600)])
@pytest.mark.usefixtures("guarded_allocations")
def test_every_instruction_set_gives_the_same(library, monkeypatch, on_threads, guarded, level, width, queries, keys):
    if level not in library.attention_levels():
        pytest.skip(f"this CPU or this compiler knows no {level}")
    number = library.attention_levels().index(level)
    monkeypatch.setattr(native, "_forward", functools.partial(library.attention_forward, level=number))
    monkeypatch.setattr(native, "_backward", functools.partial(library.attention_backward, level=number))
    on_threads(2)
    grad, q, k, v = numbers(1, queries, keys, 2, width)
    key_present = torch.rand(1, keys) < 0.7
    for present in (None, key_present):
        out, lse = attention_forward(q, k, v, present)
        grads = [guarded(*tensor.shape) for tensor in (q, k, v)]
        attention_backward(grad, (q, k, v), present, out, lse, grads)
        assert_close([out, lse, *grads], by_hand(grad, q, k, v, present))


def test_the_best_instruction_set_comes_first(library):
    levels = library.attention_levels()
    assert levels == [level for level in LEVELS if level in levels]
    assert "plain" in levels


def present(pattern: str, batch: int, keys: int) -> Tensor:
    random = torch.rand(batch, keys) < 0.6
    rows = {
        "all": torch.ones(batch, keys, dtype=torch.bool),
        "none": torch.zeros(batch, keys, dtype=torch.bool),
        "random": random,
        "first": torch.arange(keys).expand(batch, -1) < 1,
        "last": torch.arange(keys).expand(batch, -1) == keys - 1,
        "every other": torch.arange(keys).expand(batch, -1) % 2 == 1,
        "one sample without": random & (torch.arange(batch) != 1)[:, None],
    }
    return rows[pattern]


@pytest.mark.parametrize("pattern", ["all", "none", "random", "first", "last", "every other", "one sample without"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 5), (65, 150), (100, 784)])
def test_only_keys_that_are_present_count_whatever_the_others_hold(pattern, queries, keys):
    grad, q, k, v = numbers(3, queries, keys, 2, 20)
    key_present = present(pattern, 3, keys)
    expected = by_hand(grad, q, k, v, key_present)
    gone = ~key_present[:, :, None, None]
    ours = run(grad, q, k.masked_fill(gone, math.nan), v.masked_fill(gone, math.inf), key_present)
    assert_close(ours, expected)
    for grad_keys in ours[3:]:
        assert not bool(grad_keys.masked_select(gone).any())
    for b in range(3):
        if not bool(key_present[b].any()):
            assert not bool(ours[0][b].any() | ours[2][b].any())
            assert bool((ours[1][b] == -math.inf).all())


def test_all_keys_present_is_bitwise_no_mask():
    case = numbers(2, 70, 90, 2, 33)
    assert all(map(torch.equal, run(*case), run(*case, torch.ones(2, 90, dtype=torch.bool))))


def strided(layout: str, tensor: Tensor, inside) -> Tensor:
    if layout == "inside":
        return inside(tensor)
    if layout == "heads first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns":
        return tensor.transpose(1, 3).contiguous().transpose(1, 3)
    if layout == "every other":
        return torch.stack((tensor, torch.full_like(tensor, math.nan)), -1).flatten(-2)[..., ::2]
    return {
        "one token": tensor[:, :1],
        "one head": tensor[:, :, :1],
        "one sample": tensor[:1],
        "one number": tensor[..., :1],
    }[layout].expand(tensor.shape)


@pytest.mark.parametrize(
    "layout",
    ["inside", "heads first", "columns", "every other", "one token", "one head", "one sample", "one number"],
)
def test_inputs_may_have_any_strides(layout, inside):
    case = [strided(layout, tensor, inside) for tensor in numbers(3, 31, 45, 4, 12)]
    assert_close(run(*case), by_hand(*case))


@pytest.mark.parametrize("width", [64, 20])
@pytest.mark.usefixtures("guarded_allocations")
def test_gradients_go_straight_into_one_packed_tensor(on_threads, guarded, width):
    packed = torch.randn(3, 65, 3, 4, width)
    grad, (q, k, v) = torch.randn(3, 65, 4, width), packed.unbind(2)
    expected = by_hand(grad, q, k, v)
    for threads in (1, 2, 5):
        on_threads(threads)
        grads = guarded(3, 65, 3, 4, width)
        out, lse = attention_forward(q, k, v)
        attention_backward(grad, (q, k, v), None, out, lse, grads.unbind(2))
        assert_close([out, lse, *grads.unbind(2)], expected)


def test_nothing_is_written_between_the_rows_of_a_gradient(on_threads, inside):
    on_threads(2)
    grad, q, k, v = numbers(2, 9, 70, 3, 13)
    key_present = torch.rand(2, 70) < 0.5
    shapes = [tensor.shape for tensor in (q, k, v)]
    buffers = [torch.full([size + 3 for size in shape], -12345.0) for shape in shapes]
    grads = [buffer[tuple(slice(2, 2 + size) for size in shape)] for buffer, shape in zip(buffers, shapes, strict=True)]
    out, lse = attention_forward(q, k, v, key_present)
    attention_backward(grad, (q, k, v), key_present, inside(out), lse, grads)
    assert_close([out, lse, *grads], by_hand(grad, q, k, v, key_present))
    for view, buffer in zip(grads, buffers, strict=True):
        view.fill_(-12345)
        assert bool((buffer == -12345).all())


def test_no_output_is_a_view_of_another_tensor():
    _, q, k, v = numbers(2, 3, 4, 2, 8)
    assert not any(output._is_view() for output in attention_forward(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default_dtype, dtype):
    case = numbers(2, 7, 9, 2, 8)
    default_dtype(dtype)
    ours = attention_forward(*case[1:])
    default_dtype(torch.float32)
    assert_close(list(ours), by_hand(*case)[:2])


@pytest.mark.parametrize("shape", [(2, 260, 130, 3, 40), (1, 1000, 40, 1, 64), (4, 5, 7, 3, 8)])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(on_threads, shape):
    case = numbers(*shape)
    key_present = torch.rand(shape[0], shape[2]) < 0.8
    on_threads(1)
    expected = run(*case, key_present)
    for threads in (1, 2, 3, 16, *[2] * 20):
        on_threads(threads)
        assert all(map(torch.equal, run(*case, key_present), expected))


def test_a_sample_does_not_depend_on_its_batch_mates_nor_on_where_it_lies(inside):
    case = numbers(3, 50, 70, 2, 24)
    key_present = torch.rand(3, 70) < 0.8
    together = run(*case, key_present)
    for b in range(3):
        alone = run(*(inside(tensor[b : b + 1]) for tensor in case), key_present[b : b + 1])
        assert all(torch.equal(mine[b : b + 1], own) for mine, own in zip(together, alone, strict=True))


@pytest.mark.parametrize("cut", [1, 100, 299])
def test_shares_of_the_keys_with_the_common_sum_give_the_gradients_of_all(cut):
    grad, q, k, v = numbers(2, 40, 300, 2, 32)
    expected = by_hand(grad, q, k, v)
    halves = [(k[:, :cut], v[:, :cut]), (k[:, cut:], v[:, cut:])]
    parts = [attention_forward(q, *half) for half in halves]
    lse = torch.stack([part[1] for part in parts]).logsumexp(0)
    out = sum(part * torch.exp(own - lse).transpose(1, 2)[..., None] for part, own in parts)
    assert_close([out, lse], expected[:2])
    grads = [[torch.empty(tensor.shape) for tensor in (q, *half)] for half in halves]
    for half, outs in zip(halves, grads, strict=True):
        attention_backward(grad, (q, *half), None, out, lse, outs)
    whole = [sum(outs[0] for outs in grads), *(torch.cat([outs[i] for outs in grads], 1) for i in (1, 2))]
    assert_close(whole, expected[2:])


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores_do_not_overflow(size):
    grad, q, k, v = numbers(1, 65, 130, 2, 16)
    q = q * (size / float((torch.einsum("bqhd,bkhd->bhqk", q, k) / 4).abs().max()))
    ours, expected = run(grad, q, k, v), by_hand(grad, q, k, v)
    # A score, and with it a share, is off by a few units of the last place of the largest.
    for mine, (exact, cancelled) in zip(ours, expected, strict=True):
        error = float((mine.double() - exact).norm())
        assert error <= (TOLERANCE + 4 * 2**-24 * size) * (float(exact.norm()) + cancelled)


def test_one_key_far_above_the_others_has_all_the_weight():
    grad, q, k, v = numbers(1, 65, 130, 2, 16)
    k[:, 5] = 100 * q[:, 40]
    out, _, _, _, grad_v = run(grad[:, 40:41], q[:, 40:41], k, v)
    assert torch.equal(out[:, 0], v[:, 5])
    assert torch.equal(grad_v[:, 5], grad[:, 40])


def test_equal_scores_give_the_mean():
    _, q, k, v = numbers(2, 5, 600, 2, 48)
    for same in (torch.zeros_like(k), k[:, :1].expand_as(k) * 1000):
        out, lse = attention_forward(q, same, v)
        assert float((out - v.mean(1, keepdim=True)).abs().max()) <= 1e-6
        assert float((lse - by_hand(q, q, same, v)[1].value).abs().max()) <= TOLERANCE * float(lse.abs().max())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(wrong):
    grad, q, k, v = numbers(1, 40, 50, 2, 16)
    expected = run(grad, q, k, v)
    broken = q.clone()
    broken[0, 7, 1, 3] = wrong
    ours = run(grad, broken, k, v)
    for mine, right in zip(ours[:1] + ours[2:3], expected[:1] + expected[2:3], strict=True):
        assert bool(mine[0, 7, 1].isnan().all())
        mine[0, 7, 1] = right[0, 7, 1]
        assert torch.equal(mine, right)
    assert bool(ours[1][0, 1, 7].isnan())
    assert torch.equal(ours[3][:, :, 0], expected[3][:, :, 0])


@pytest.mark.parametrize("where", ["k", "v"])
def test_a_key_or_value_that_is_not_finite_spoils_its_head_only(where):
    grad, q, k, v = numbers(1, 40, 50, 2, 16)
    expected = run(grad, q, k, v)
    broken = {"k": k.clone(), "v": v.clone()}
    broken[where][0, 7, 1, 3] = math.nan
    ours = run(grad, q, **broken)
    assert bool(ours[0][0, :, 1, 3].isnan().all())
    for mine, right in zip(ours[:1] + ours[2:], expected[:1] + expected[2:], strict=True):
        assert torch.equal(mine[:, :, 0], right[:, :, 0])


def test_rows_without_keys_get_no_gradients_whatever_comes_in():
    grad, q, k, v = numbers(1, 30, 20, 2, 16)
    out, lse = attention_forward(q, k, v)
    expected = [torch.empty(tensor.shape) for tensor in (q, k, v)]
    grad[0, 3] = 0
    attention_backward(grad, (q, k, v), None, out, lse, expected)
    grad[0, 3], lse[0, :, 3] = math.nan, -math.inf
    grads = [torch.empty(tensor.shape) for tensor in (q, k, v)]
    attention_backward(grad, (q, k, v), None, out, lse, grads)
    assert not bool(grads[0][0, 3].any())
    assert all(map(torch.equal, grads, expected))

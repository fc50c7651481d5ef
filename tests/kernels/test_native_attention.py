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
from mmmae_kernels.attention.backends.sdpa import attention_sdpa

# In float32 a score is off by about sqrt(d) roundings, at most 16 * 2^-24 of numbers near one, its exponential by 2
# more. Two sums follow, three for the gradients of queries and keys: 1e-5 holds for scores of a few units. In bfloat16
# weights, gradients of scores and outputs are rounded to 2^-9, all else is float32: four such roundings bound the
# error. There, log-sum-exps are off by the 1e-4 of the exponential.
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-9}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-9}
LEVELS = {
    torch.float32: ("avx512", "avx2", "plain"),
    torch.bfloat16: ("amx", "avx512_bf16", "avx512", "avx2", "plain", "amx_model"),
}
FORCED = {  # cases of every level: queries, keys and width
    torch.float32: [
        *[(65, 63, width) for width in (1, 7, 32, 64, 80, 96, 128, 256)],
        *[(130, 600, width) for width in (7, 64, 80, 256)],
        *[(1, 1, 32), (7, 33, 7)],
    ],
    torch.bfloat16: [(1, 1, 64), (7, 33, 7), (65, 63, 80), (130, 600, 64), (130, 600, 80)],
}
pytestmark = pytest.mark.usefixtures("library", "poisoned")


@pytest.fixture(params=LEVELS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def numbers(dtype):
    """Draws a gradient, queries, keys and values."""

    def draw(batch: int, queries: int, keys: int, heads: int, width: int) -> tuple[Tensor, ...]:
        grad, q = torch.randn(2, batch, queries, heads, width).to(dtype)
        k, v = torch.randn(2, batch, keys, heads, width).to(dtype)
        return grad, q, k, v

    return draw


@pytest.fixture
def levels(library, dtype) -> list[str]:
    return library.attention_levels() if dtype is torch.float32 else library.attention_levels_bfloat16()


@pytest.fixture
def at_level(monkeypatch, dtype, levels):
    """Makes attention use the instruction set of this name."""

    def choose(level: str) -> None:
        if level not in levels:
            pytest.skip(f"this CPU or this compiler knows no {level}")
        for functions in (native._FORWARD, native._BACKWARD):
            function = functools.partial(functions[dtype], level=levels.index(level))
            monkeypatch.setitem(functions, dtype, function)

    return choose


class Exact(NamedTuple):
    value: Tensor
    tolerance: float  # relative to the norm
    unit: float = 0  # of what cancels in it
    cancelled: float = 0  # the norm of what cancels in it


def by_hand(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None = None) -> list[Exact]:
    """Compute out, lse and the gradients of q, k and v in float64."""
    tolerance, unit, half = TOLERANCE[q.dtype], UNIT[q.dtype], q.dtype is torch.bfloat16
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
    of_lse = Exact(lse, 0, 1e-4 / 4, math.sqrt(lse.numel())) if half else Exact(lse, tolerance)
    return [
        Exact(out, tolerance),
        of_lse,
        Exact(torch.einsum(of_q, grad_scores, k), tolerance, unit, float(torch.einsum(of_q, parts, k.abs()).norm())),
        Exact(torch.einsum(of_k, grad_scores, q), tolerance, unit, float(torch.einsum(of_k, parts, q.abs()).norm())),
        Exact(torch.einsum(of_k, share, grad), tolerance),
    ]


def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_present: Tensor | None = None) -> list[Tensor]:
    out, lse = attention_forward(q, k, v, key_present)
    grads = [torch.empty(tensor.shape, dtype=q.dtype) for tensor in (q, k, v)]
    attention_backward(grad, (q, k, v), key_present, out, lse, grads)
    return [out, lse, *grads]


def assert_close(ours: list[Tensor], expected: list[Exact]) -> None:
    """Compare relative to each norm, or within 4 roundings of the terms that cancel (with one key, all of them)."""
    for mine, (exact, tolerance, unit, cancelled) in zip(ours, expected, strict=True):
        assert mine.shape == exact.shape
        assert torch.equal(mine.isinf(), exact.isinf())
        error = (mine.double() - exact).masked_fill(exact.isinf(), 0)
        norm = exact.masked_fill(exact.isinf(), 0).norm()
        assert float(error.norm()) <= max(tolerance * float(norm), 4 * unit * cancelled)


@pytest.mark.parametrize("tokens", [0, 1, 7, 63, 65, 196, 784])
def test_a_sequence_may_have_any_length(numbers, tokens):
    case = numbers(2, tokens, tokens, 2, 64)
    assert_close(run(*case), by_hand(*case))


@pytest.mark.parametrize(
    ("queries", "keys"),
    [(0, 5), (5, 0), (1, 300), (300, 1), (588, 784), (119, 513), (121, 1031), (240, 127), (33, 2049)],
)
def test_queries_and_keys_may_differ_in_number(numbers, queries, keys):
    case = numbers(1, queries, keys, 2, 24)
    assert_close(run(*case), by_hand(*case))


@pytest.mark.parametrize("width", [1, 2, 7, 16, 17, 32, 33, 48, 64, 80, 96, 112, 128, 144, 200, HEAD_WIDTH_LIMIT])
def test_heads_may_have_any_width(numbers, width):
    case = numbers(2, 63, 65, 3, width)
    assert_close(run(*case), by_hand(*case))


@pytest.mark.parametrize(("batch", "heads"), [(0, 3), (3, 0), (1, 1), (5, 7)])
def test_there_may_be_any_number_of_samples_and_heads(numbers, batch, heads):
    case = numbers(batch, 9, 11, heads, 8)
    assert_close(run(*case), by_hand(*case))


@pytest.mark.parametrize(
    ("dtype", "level", "queries", "keys", "width"),
    [(dtype, level, *case) for dtype in LEVELS for level in LEVELS[dtype] for case in FORCED[dtype]],
    indirect=["dtype"],
)
@pytest.mark.usefixtures("guarded_allocations")
def test_every_instruction_set_gives_the_same(numbers, at_level, on_threads, guarded, level, width, queries, keys):
    at_level(level)
    grad, q, k, v = numbers(1, queries, keys, 2, width)
    masks = (None, torch.rand(1, keys) < 0.7)
    expected = [by_hand(grad, q, k, v, present) for present in masks]
    on_threads(2)
    for present, right in zip(masks, expected, strict=True):
        out, lse = attention_forward(q, k, v, present)
        grads = [guarded(*tensor.shape, dtype=tensor.dtype) for tensor in (q, k, v)]
        attention_backward(grad, (q, k, v), present, out, lse, grads)
        assert_close([out, lse, *grads], right)


@pytest.mark.parametrize(("dtype", "levels_of"), list(LEVELS.items()), indirect=["dtype"])
def test_the_best_instruction_set_comes_first(levels, levels_of):
    order = [level for level in levels if level != "avx512_bf16"]  # its place depends on the CPU's vendor
    assert order == [level for level in levels_of if level in order]
    assert "plain" in levels


@pytest.mark.parametrize("dtype", [torch.bfloat16], indirect=True)
@pytest.mark.parametrize(("queries", "keys", "width"), [(196, 196, 64), (130, 600, 80), (16, 16, 32), (33, 17, 7)])
def test_the_model_of_amx_computes_what_amx_does(numbers, at_level, queries, keys, width):
    """Apart from numbers that are rounded the other way, as sums and exponentials differ in their last place."""
    case = numbers(1, queries, keys, 2, width)
    at_level("amx")
    by_amx = run(*case)
    at_level("amx_model")
    by_model = run(*case)
    for mine, other in zip(by_model, by_amx, strict=True):
        assert float((mine.double() - other.double()).norm()) <= 2**-11 * float(other.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16], indirect=True)
@pytest.mark.parametrize("level", LEVELS[torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "width"), [(196, 196, 64), (100, 784, 64), (65, 63, 80), (7, 33, 32)])
def test_half_precision_errs_at_most_twice_as_much_as_torch(numbers, at_level, level, queries, keys, width):
    at_level(level)
    grad, q, k, v = numbers(1, queries, keys, 2, width)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    theirs = attention_sdpa(*leaves, None)
    out, _, *grads = run(grad, q, k, v)
    exact_out, _, *exact_grads = by_hand(grad, q, k, v)
    pairs = zip([out, *grads], [theirs, *torch.autograd.grad(theirs, leaves, grad)], strict=True)
    for (mine, other), exact in zip(pairs, [exact_out, *exact_grads], strict=True):
        assert mine.dtype == torch.bfloat16
        error, allowed = (float((tensor.double() - exact.value).norm()) for tensor in (mine, other.detach()))
        assert error <= 2 * allowed


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
def test_only_keys_that_are_present_count_whatever_the_others_hold(numbers, pattern, queries, keys):
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


def test_all_keys_present_is_bitwise_no_mask(numbers):
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
def test_inputs_may_have_any_strides(numbers, layout, inside):
    case = [strided(layout, tensor, inside) for tensor in numbers(3, 31, 45, 4, 12)]
    assert_close(run(*case), by_hand(*case))


@pytest.mark.parametrize("width", [64, 20])
@pytest.mark.usefixtures("guarded_allocations")
def test_gradients_go_straight_into_one_packed_tensor(dtype, on_threads, guarded, width):
    packed = torch.randn(3, 65, 3, 4, width).to(dtype)
    grad, (q, k, v) = torch.randn(3, 65, 4, width).to(dtype), packed.unbind(2)
    expected = by_hand(grad, q, k, v)
    for threads in (1, 2, 5):
        on_threads(threads)
        grads = guarded(3, 65, 3, 4, width, dtype=dtype)
        out, lse = attention_forward(q, k, v)
        attention_backward(grad, (q, k, v), None, out, lse, grads.unbind(2))
        assert_close([out, lse, *grads.unbind(2)], expected)


def test_nothing_is_written_between_the_rows_of_a_gradient(numbers, dtype, on_threads, inside):
    on_threads(2)
    grad, q, k, v = numbers(2, 9, 70, 3, 13)
    key_present = torch.rand(2, 70) < 0.5
    shapes = [tensor.shape for tensor in (q, k, v)]
    buffers = [torch.full([size + 3 for size in shape], -12288.0, dtype=dtype) for shape in shapes]
    grads = [buffer[tuple(slice(2, 2 + size) for size in shape)] for buffer, shape in zip(buffers, shapes, strict=True)]
    out, lse = attention_forward(q, k, v, key_present)
    attention_backward(grad, (q, k, v), key_present, inside(out), lse, grads)
    assert_close([out, lse, *grads], by_hand(grad, q, k, v, key_present))
    for view, buffer in zip(grads, buffers, strict=True):
        view.fill_(-12288)
        assert bool((buffer == -12288).all())


def test_no_output_is_a_view_of_another_tensor(numbers):
    _, q, k, v = numbers(2, 3, 4, 2, 8)
    assert not any(output._is_view() for output in attention_forward(q, k, v))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(numbers, default_dtype, default):
    case = numbers(2, 7, 9, 2, 8)
    default_dtype(default)
    ours = attention_forward(*case[1:])
    default_dtype(torch.float32)
    assert_close(list(ours), by_hand(*case)[:2])


@pytest.mark.parametrize("shape", [(2, 260, 130, 3, 40), (1, 1000, 40, 1, 64), (4, 5, 7, 3, 8)])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(numbers, on_threads, shape):
    case = numbers(*shape)
    key_present = torch.rand(shape[0], shape[2]) < 0.8
    on_threads(1)
    expected = run(*case, key_present)
    for threads in (1, 2, 3, 16, *[2] * 20):
        on_threads(threads)
        assert all(map(torch.equal, run(*case, key_present), expected))


def test_a_sample_does_not_depend_on_its_batch_mates_nor_on_where_it_lies(numbers, inside):
    case = numbers(3, 50, 70, 2, 24)
    key_present = torch.rand(3, 70) < 0.8
    together = run(*case, key_present)
    for b in range(3):
        alone = run(*(inside(tensor[b : b + 1]) for tensor in case), key_present[b : b + 1])
        assert all(torch.equal(mine[b : b + 1], own) for mine, own in zip(together, alone, strict=True))


@pytest.mark.parametrize("cut", [1, 100, 299])
def test_shares_of_the_keys_with_the_common_sum_give_the_gradients_of_all(numbers, cut):
    grad, q, k, v = numbers(2, 40, 300, 2, 32)
    expected = by_hand(grad, q, k, v)
    halves = [(k[:, :cut], v[:, :cut]), (k[:, cut:], v[:, cut:])]
    parts = [attention_forward(q, *half) for half in halves]
    lse = torch.stack([part[1] for part in parts]).logsumexp(0)
    out = sum(part * torch.exp(own - lse).transpose(1, 2)[..., None] for part, own in parts).to(q.dtype)
    assert_close([out, lse], expected[:2])
    grads = [[torch.empty(tensor.shape, dtype=q.dtype) for tensor in (q, *half)] for half in halves]
    for half, outs in zip(halves, grads, strict=True):
        attention_backward(grad, (q, *half), None, out, lse, outs)
    whole = [sum(outs[0] for outs in grads), *(torch.cat([outs[i] for outs in grads], 1) for i in (1, 2))]
    assert_close(whole, expected[2:])


@pytest.mark.parametrize("size", [1e2, 1e4, -400])
def test_large_scores_do_not_overflow(numbers, dtype, size):
    grad, q, k, v = numbers(1, 65, 130, 2, 16)
    if size > 0:
        q = q * (size / float((torch.einsum("bqhd,bkhd->bhqk", q, k) / 4).abs().max()))
    else:  # all scores, so that exp(0 - lse) of the keys that pad a block would be infinite
        q[..., 0], k[..., 0] = 16, size / 4
    ours, expected = run(grad, q, k, v), by_hand(grad, q, k, v)
    # A score, and with it a share, is off by a few units of the last place of the largest.
    for mine, (exact, _, _, cancelled) in zip(ours, expected, strict=True):
        error = float((mine.double() - exact).norm())
        assert error <= (TOLERANCE[dtype] + 4 * 2**-24 * abs(size)) * (float(exact.norm()) + cancelled)


@pytest.mark.parametrize(
    ("dtype", "level"), [(dtype, level) for dtype in LEVELS for level in LEVELS[dtype]], indirect=["dtype"]
)
@pytest.mark.parametrize(("size", "width"), [(1e8, 80), (1e11, 64)])
def test_of_huge_scores_the_largest_has_all_the_weight(numbers, at_level, level, size, width):
    """They differ by more than the rounding of any: so results are as exact as ever."""
    at_level(level)
    grad, q, k, v = numbers(1, 35, 550, 1, width)
    factor = math.sqrt(size / float(torch.einsum("bqhd,bkhd->bhqk", q, k).abs().max()) * math.sqrt(width))
    case = grad, q * factor, k * factor, v
    (out, lse, *grads), (exact_out, exact_lse, *exact_grads) = run(*case), by_hand(*case)
    assert_close([out, *grads], [exact_out, *exact_grads])
    assert float((lse - exact_lse.value).norm()) <= 1e-6 * float(exact_lse.value.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16], indirect=True)
@pytest.mark.parametrize("level", LEVELS[torch.bfloat16])
def test_a_denormal_weight_is_zero_forward_and_backward(numbers, at_level, level):
    """To make such numbers is slow, and products take them for zero."""
    at_level(level)
    grad, q, k, v = numbers(1, 35, 70, 1, 16)
    q[...], k[:, :, :, 0], v[:, 6] = 0, 0, 2.0**100
    q[..., 0], k[:, 5, :, 0] = 16, 22.5  # beside this key, the others have weights of 2^-130
    _, _, _, grad_k, grad_v = run(grad, q, k, v)
    assert not bool(grad_k[:, 6].any() | grad_v[:, 6].any())


def test_one_key_far_above_the_others_has_all_the_weight(numbers):
    grad, q, k, v = numbers(1, 65, 130, 2, 16)
    k[:, 5] = 100 * q[:, 40]
    out, _, _, _, grad_v = run(grad[:, 40:41], q[:, 40:41], k, v)
    assert torch.equal(out[:, 0], v[:, 5])
    assert torch.equal(grad_v[:, 5], grad[:, 40])


def test_equal_scores_give_the_mean(numbers, dtype):
    _, q, k, v = numbers(2, 5, 600, 2, 48)
    for same in (torch.zeros_like(k), k[:, :1].expand_as(k) * 1000):
        out, lse = attention_forward(q, same, v)
        mean = v.float().mean(1, keepdim=True)
        rounding = 0 if dtype is torch.float32 else 2 * UNIT[dtype] * float(mean.abs().max())
        assert float((out - mean).abs().max()) <= 1e-6 + rounding
        assert float((lse - by_hand(q, q, same, v)[1].value).abs().max()) <= 1e-5 * float(lse.abs().max())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(numbers, wrong):
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
def test_a_key_or_value_that_is_not_finite_spoils_its_head_only(numbers, where):
    grad, q, k, v = numbers(1, 40, 50, 2, 16)
    expected = run(grad, q, k, v)
    broken = {"k": k.clone(), "v": v.clone()}
    broken[where][0, 7, 1, 3] = math.nan
    ours = run(grad, q, **broken)
    assert bool(ours[0][0, :, 1, 3].isnan().all())
    for mine, right in zip(ours[:1] + ours[2:], expected[:1] + expected[2:], strict=True):
        assert torch.equal(mine[:, :, 0], right[:, :, 0])


def test_rows_without_keys_get_no_gradients_whatever_comes_in(numbers):
    grad, q, k, v = numbers(1, 30, 20, 2, 16)
    out, lse = attention_forward(q, k, v)
    expected = [torch.empty(tensor.shape, dtype=q.dtype) for tensor in (q, k, v)]
    grad[0, 3] = 0
    attention_backward(grad, (q, k, v), None, out, lse, expected)
    grad[0, 3], lse[0, :, 3] = math.nan, -math.inf
    grads = [torch.empty(tensor.shape, dtype=q.dtype) for tensor in (q, k, v)]
    attention_backward(grad, (q, k, v), None, out, lse, grads)
    assert not bool(grads[0][0, 3].any())
    assert all(map(torch.equal, grads, expected))

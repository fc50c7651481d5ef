"""The compiled decoder's input and its gradients against float64, on ids and strides that hurt."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from mmmae_kernels import decoder_tokens, use_backend
from mmmae_kernels.decoder_tokens.cpu import decoder_tokens_backward, decoder_tokens_forward

# Of the sum of magnitudes: a number is a sum of sums of at most 32, whose errors hardly ever add up.
TOLERANCE = 8 * 2**-24
pytestmark = pytest.mark.usefixtures("library", "poisoned")


def forward_by_hand(visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor) -> Tensor:
    keep = visible.shape[1]
    tokens = mask_token.expand(*ids_restore.shape, -1).clone()
    for b, n in (ids_restore < keep).nonzero().tolist():
        tokens[b, n] = visible[b, ids_restore[b, n]]
    return tokens + position


def backward_by_hand(grad: Tensor, ids_restore: Tensor, keep: int) -> list[Tensor]:
    grad = grad.double()
    visible = grad.new_zeros(grad.shape[0], keep, grad.shape[2])
    for b, n in (ids_restore < keep).nonzero().tolist():
        visible[b, ids_restore[b, n]] += grad[b, n]
    return [visible, grad[ids_restore >= keep].sum(0), grad.sum(0)]


def assert_gradients(ours, grad: Tensor, ids_restore: Tensor, keep: int) -> None:
    expected = backward_by_hand(grad, ids_restore, keep)
    for one, other, magnitude in zip(ours, expected, backward_by_hand(grad.abs(), ids_restore, keep), strict=True):
        assert one.shape == other.shape
        assert one.dtype == torch.float32
        assert one.is_contiguous()
        assert float((one.double() - other).norm()) <= TOLERANCE * float(magnitude.norm())


def permutations(batch: int, tokens: int) -> Tensor:
    return torch.rand(batch, tokens).argsort(1)


def inputs(batch: int, tokens: int, keep: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, keep, width),
        torch.randn(width),
        permutations(batch, tokens),
        torch.randn(tokens, width),
    )


@pytest.mark.parametrize("width", [1, 64, 192, 768, 1000])
@pytest.mark.parametrize("tokens", [1, 7, 63, 65, 783])
def test_values_and_gradients_are_right(tokens, width):
    batch = 1 if tokens == 783 else 3
    for keep in {0, (tokens + 3) // 4, tokens}:
        visible, mask_token, ids, position = inputs(batch, tokens, keep, width)
        out = decoder_tokens_forward(visible, mask_token, ids, position)
        assert torch.equal(out, forward_by_hand(visible, mask_token, ids, position))
        grad = torch.randn_like(out)
        assert_gradients(decoder_tokens_backward(grad, ids, keep), grad, ids, keep)


@pytest.mark.parametrize(
    ("batch", "tokens", "keep", "width"), [(0, 5, 2, 8), (2, 0, 0, 8), (0, 0, 0, 8), (2, 5, 3, 0), (2, 50, 3, 0)]
)
def test_nothing_gives_nothing(batch, tokens, keep, width):
    assert decoder_tokens_forward(*inputs(batch, tokens, keep, width)).shape == (batch, tokens, width)
    grad, ids = torch.empty(batch, tokens, width), permutations(batch, tokens)
    assert_gradients(decoder_tokens_backward(grad, ids, keep), grad, ids, keep)


def test_a_row_named_twice_gets_the_sum_in_order_and_one_never_named_gets_zero():
    ids = torch.tensor([[1, 3, 1, 1, 0], [4, 4, 3, 3, 3]])
    grad = torch.randn(2, 5, 40) * 10.0 ** torch.randint(-3, 4, (2, 5, 1))
    visible, _, _ = decoder_tokens_backward(grad, ids, 3)
    assert torch.equal(visible[0], torch.stack([grad[0, 4], grad[0, 0] + grad[0, 2] + grad[0, 3], torch.zeros(40)]))
    assert torch.equal(visible[1], torch.zeros(3, 40))
    inputs_ = (torch.randn(2, 3, 40), torch.randn(40), ids, torch.randn(5, 40))
    assert torch.equal(decoder_tokens_forward(*inputs_), forward_by_hand(*inputs_))


@pytest.mark.parametrize("keep", [0, 20, 64])
def test_ids_may_be_any(keep):
    ids = torch.randint(0, 65, (4, 65))
    grad = torch.randn(4, 65, 150)
    assert_gradients(decoder_tokens_backward(grad, ids, keep), grad, ids, keep)


STRIDES = {
    "inside NaN": lambda t: t,  # by the fixture
    "batch first and second swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second channel": lambda t: t.repeat_interleave(2, -1)[..., 1::2],
    "one row expanded": lambda t: t[:1].expand(t.shape),
    "one channel expanded": lambda t: t[..., :1].expand(t.shape),
    "one number expanded": lambda t: t.flatten()[0].expand(t.shape),
}


@pytest.mark.parametrize("layout", STRIDES)
def test_inputs_and_gradients_may_have_any_strides(inside, layout):
    visible, mask_token, ids, position = inputs(3, 65, 16, 192)
    change = inside if layout == "inside NaN" else STRIDES[layout]
    visible, position = change(visible), change(position)
    ids = inside(ids)
    mask_token = torch.randn(192, 2)[:, 0] if layout == "every second channel" else inside(mask_token)
    out = decoder_tokens_forward(visible, mask_token, ids, position)
    assert torch.equal(out, forward_by_hand(visible, mask_token, ids, position))
    grad = change(torch.randn(3, 65, 192))
    assert_gradients(decoder_tokens_backward(grad, ids, 16), grad, ids, 16)


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends the process instead")
def test_sums_that_memory_does_not_hold_raise(library):
    """As an exception in a parallel region they would end the process."""
    width = 2**20
    grad, ids = torch.zeros(1, 2, width, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.int64)
    strides, sizes = (2 * width, width), (1, 2**26, 2, width)  # the sums alone would take 2^48 bytes
    position, mask_token = torch.empty_like(grad), torch.empty(width)
    addresses = grad.data_ptr(), strides, ids.data_ptr(), (2, 1), 0, mask_token.data_ptr(), position.data_ptr()
    with pytest.raises(MemoryError):
        library.decoder_tokens_backward(*addresses, 1, sizes, 1)


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(97, 192), (7, 33)])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(on_threads, tokens, width, repeats):
    visible, mask_token, ids, position = inputs(5, tokens, 3, width)
    ids = torch.randint(0, tokens, ids.shape) if repeats else ids
    grad = torch.randn(5, tokens, width)
    on_threads(1)
    expected = [decoder_tokens_forward(visible, mask_token, ids, position), *decoder_tokens_backward(grad, ids, 3)]
    for threads in (1, 2, 3, *[2] * 100):
        on_threads(threads)
        again = [decoder_tokens_forward(visible, mask_token, ids, position), *decoder_tokens_backward(grad, ids, 3)]
        assert all(map(torch.equal, again, expected))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("guarded_allocations")
def test_nothing_outside_the_outputs_is_written(on_threads, threads):
    on_threads(threads)
    visible, mask_token, ids, position = inputs(3, 65, 16, 200)
    out = decoder_tokens_forward(visible, mask_token, ids, position)
    assert torch.equal(out, forward_by_hand(visible, mask_token, ids, position))
    assert_gradients(decoder_tokens_backward(out, ids, 16), out, ids, 16)


def test_no_output_is_a_view_of_another_tensor():
    visible, mask_token, ids, position = inputs(3, 7, 2, 8)
    out = decoder_tokens_forward(visible, mask_token, ids, position)
    assert not any(output._is_view() for output in (out, *decoder_tokens_backward(out, ids, 2)))


def right_inputs() -> dict[str, Tensor]:
    visible, mask_token, ids, position = inputs(2, 6, 3, 4)
    return {"visible": visible, "mask_token": mask_token, "ids_restore": ids, "position": position}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"visible": torch.zeros(2, 3, 4, dtype=torch.float64)}, "visible .*float64"),
        ({"visible": torch.zeros(3, 4)}, r"visible has shape \[3, 4\]"),
        ({"visible": torch.zeros(2, 7, 4)}, "visible has 7 tokens"),
        ({"visible": torch.zeros(2, 3, 4, device="meta")}, "meta"),
        ({"mask_token": torch.zeros(5)}, r"mask_token has shape \[5\]"),
        ({"mask_token": torch.zeros(4, device="meta")}, "mask_token .*meta"),
        ({"position": torch.zeros(5, 4)}, r"position has shape \[5, 4\]"),
        ({"position": torch.zeros(6, 4, device="meta")}, "position .*meta"),
        ({"ids_restore": torch.zeros(2, 6, dtype=torch.int32)}, "ids_restore .*int32"),
        ({"ids_restore": torch.zeros(3, 6, dtype=torch.int64)}, r"ids_restore has shape \[3, 6\]"),
        ({"ids_restore": torch.full((2, 6), 6)}, "ids_restore contains 6"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with use_backend("native"), pytest.raises(ValueError, match=message):
        decoder_tokens(**{**right_inputs(), **wrong})


@pytest.mark.parametrize("wrong", [6, -1, 2**62])
def test_ids_out_of_range_are_refused_and_nothing_is_written(guarded_allocations, wrong):
    right = right_inputs()
    right["ids_restore"][1, 4] = wrong
    message = rf"^ids_restore\[1, 4\] is {wrong}, expected 0\.\.5"
    with pytest.raises(ValueError, match=message):
        decoder_tokens_forward(**right)
    with pytest.raises(ValueError, match=message):
        decoder_tokens_backward(torch.zeros(2, 6, 4), right["ids_restore"], 3)
    assert len(guarded_allocations) == 4
    assert all(bool(output.isnan().all()) for output in guarded_allocations)


def test_a_thread_count_below_one_is_refused(library):
    none, sizes = (0, 0), (0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"^threads is 0, expected"):
        library.decoder_tokens(0, none, 0, 0, none, 0, 0, 0, (0, 0, 0), sizes, 0)
    with pytest.raises(ValueError, match=r"^threads is 0, expected"):
        library.decoder_tokens_backward(0, none, 0, none, 0, 0, 0, 0, sizes, 0)

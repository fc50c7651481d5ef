"""The compiled decoder's input and its gradients against float64, on ids and strides that hurt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize(("batch", "tokens", "keep"), [(0, 5, 2), (2, 0, 0), (0, 0, 0)])
def test_nothing_gives_nothing(batch, tokens, keep):
    assert decoder_tokens_forward(*inputs(batch, tokens, keep, 8)).shape == (batch, tokens, 8)
    grad, ids = torch.empty(batch, tokens, 8), permutations(batch, tokens)
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


def test_nothing_outside_the_outputs_is_written(library, guarded):
    visible, mask_token, ids, position = inputs(3, 65, 16, 200)
    for threads in (1, 2):
        out, *gradients = guarded(3, 65, 200), guarded(3, 16, 200), guarded(200), guarded(65, 200)
        library.decoder_tokens(visible, mask_token, ids, position, out, threads)
        assert torch.equal(out, forward_by_hand(visible, mask_token, ids, position))
        library.decoder_tokens_backward(out, ids, *gradients, threads)
        assert_gradients(gradients, out, ids, 16)


def right_inputs() -> dict[str, Tensor]:
    visible, mask_token, ids, position = inputs(2, 6, 3, 4)
    return {"visible": visible, "mask_token": mask_token, "ids_restore": ids, "position": position}


WRONG = [
    ({"visible": torch.zeros(2, 3, 4, dtype=torch.float64)}, r"^visible: dtype is float64, expected is float32"),
    ({"visible": torch.zeros(3, 4)}, r"^visible: shape is \[3, 4\], expected is \[B, K, D\]"),
    ({"visible": torch.zeros(2, 7, 4)}, r"^visible: 7 tokens, allowed are at most the 6 of ids_restore"),
    ({"visible": torch.zeros(2, 4, 3).transpose(1, 2)}, r"^visible: strides are .*, expected is 1 for the last axis"),
    ({"mask_token": torch.zeros(5)}, r"^mask_token: shape is \[5\], expected is \[4\]"),
    ({"mask_token": torch.zeros(8)[::2]}, r"^mask_token: strides are \[2\]"),
    ({"position": torch.zeros(5, 4)}, r"^position: shape is \[5, 4\], expected is \[6, 4\]"),
    ({"position": torch.zeros(4, 6).t()}, r"^position: strides are"),
]
WRONG_IDS = [
    (torch.zeros(2, 6, dtype=torch.int32), r"^ids_restore: dtype is int32, expected is int64"),
    (torch.zeros(3, 6, dtype=torch.int64), r"^ids_restore: shape is \[3, 6\], expected is \[2, 6\]"),
    (torch.full((2, 6), 6), r"^ids_restore: 6 at \[0, 0\] is outside 0\.\.5"),
    (torch.full((2, 6), -1), r"^ids_restore: -1 at \[0, 0\] is outside 0\.\.5"),
]


@pytest.mark.parametrize(("wrong", "message"), [*WRONG, *(({"ids_restore": ids}, text) for ids, text in WRONG_IDS)])
def test_wrong_inputs_are_refused_and_nothing_is_written(library, guarded, wrong, message):
    out = guarded(2, 6, 4)
    with pytest.raises(ValueError, match=message):
        library.decoder_tokens(**{**right_inputs(), **wrong}, out=out, threads=2)
    assert bool(out.isnan().all())
    if "strides" not in message:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            decoder_tokens_forward(**{**right_inputs(), **wrong})


@pytest.mark.parametrize(("ids", "message"), WRONG_IDS)
def test_wrong_ids_are_refused_backward_too(library, guarded, ids, message):
    outs = {"grad_visible": guarded(2, 3, 4), "grad_mask_token": guarded(4), "grad_position": guarded(6, 4)}
    with pytest.raises(ValueError, match=message):
        library.decoder_tokens_backward(torch.zeros(2, 6, 4), ids, **outs, threads=2)
    assert all(bool(out.isnan().all()) for out in outs.values())
    with pytest.raises(ValueError, match=message):
        decoder_tokens_backward(torch.zeros(2, 6, 4), ids, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grad": torch.zeros(2, 6, 4, dtype=torch.float16)}, r"^grad: dtype is float16"),
        ({"grad": torch.zeros(2, 4, 6).transpose(1, 2)}, r"^grad: strides are"),
        ({"grad_visible": torch.zeros(2, 7, 4)}, r"^visible: 7 tokens"),
        ({"grad_visible": torch.zeros(2, 3, 5)}, r"^grad_visible: shape is"),
        ({"grad_visible": torch.zeros(3, 2, 4).transpose(0, 1)}, r"^grad_visible: strides are"),
        ({"grad_mask_token": torch.zeros(5)}, r"^grad_mask_token: shape is \[5\], expected is \[4\]"),
        ({"grad_position": torch.zeros(6, 8)[:, ::2]}, r"^grad_position: strides are"),
        ({"threads": 0}, r"^threads: 0 given"),
    ],
)
def test_wrong_gradients_are_refused_and_nothing_is_written(library, guarded, wrong, message):
    outs = {"grad_visible": guarded(2, 3, 4), "grad_mask_token": guarded(4), "grad_position": guarded(6, 4)}
    arguments = {"grad": torch.zeros(2, 6, 4), "ids_restore": permutations(2, 6), "threads": 2, **outs, **wrong}
    with pytest.raises(ValueError, match=message):
        library.decoder_tokens_backward(**arguments)
    assert all(math.isnan(float(out.flatten()[0])) for out in outs.values())


@pytest.mark.parametrize("name", ["visible", "mask_token", "position"])
def test_tensors_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match="a tensor lies on meta"):
        decoder_tokens_forward(**{**right_inputs(), name: right_inputs()[name].to("meta")})
    with pytest.raises(ValueError, match="a tensor lies on meta"):
        decoder_tokens_backward(torch.zeros(2, 6, 4, device="meta"), permutations(2, 6), 3)

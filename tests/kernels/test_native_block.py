"""What a block keeps for backward under autocast on a CPU, and what it computes again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmmae_kernels import BlockWeights, transformer_block, use_backend
from mmmae_kernels.transformer_block import fused
from tests.cases.case import draw, draw_ids
from tests.cases.transformer_block import draw_weights

pytestmark = pytest.mark.usefixtures("library", "poisoned")

BATCH, TOKENS, WIDTH, HEADS, HIDDEN = 2, 5, 24, 3, 17


def block(some: bool = False, stream: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, BlockWeights]:
    """Return the results of a block under autocast, and its weights."""
    drawn = draw_weights(WIDTH, HIDDEN)
    weights = BlockWeights(*[drawn[name].float().requires_grad_() for name in BlockWeights._fields])
    x, residual = draw(BATCH, TOKENS, WIDTH).to(stream).requires_grad_(), draw(BATCH, TOKENS, WIDTH, seed=1).bfloat16()
    ids = draw_ids(BATCH, 3, TOKENS) if some else None
    with use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        return *transformer_block(x, residual, draw(WIDTH, seed=2).float(), weights, HEADS, ids), weights


@pytest.mark.parametrize("some", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_the_stream_after_attention_is_that_of_forward_to_the_bit(monkeypatch, some, stream):
    streams: list[Tensor] = []
    compute = fused._stream_after_attention
    monkeypatch.setattr(fused, "_stream_after_attention", lambda saved: streams.append(compute(saved)) or streams[-1])
    total, out, _ = block(some, stream)
    (total.sum() + out.sum()).backward()
    (again,) = streams
    assert again.dtype == total.dtype == stream
    assert torch.equal(again, total)


def test_neither_a_float32_sum_after_attention_nor_a_weight_in_bfloat16_is_kept():
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        total, _, weights = block()
    sums = [tensor for tensor in kept if tensor.dtype == torch.float32 and tensor.shape == total.shape]
    assert len(sums) == 1  # before attention
    assert all(tensor.data_ptr() != total.data_ptr() for tensor in kept)
    mine = {weight.data_ptr() for weight in weights}
    assert all(tensor.data_ptr() in mine for tensor in kept if tensor.dim() == 2 and tensor.shape[0] != 2)


def test_a_weight_that_changed_since_forward_is_refused():
    """As in float32: backward reads it again."""
    _, out, weights = block()
    with torch.no_grad():
        weights.fc2_weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

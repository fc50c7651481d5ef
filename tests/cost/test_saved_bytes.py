"""What a training step under autocast to bfloat16 keeps for backward, over what one in float32 keeps."""

from __future__ import annotations

import pytest
import torch

import mmmae
from mmmae.cost.counting import count_step
from mmmae.cost.gpu import ATTENTION

pytest.importorskip("triton", reason="needs triton")

# By preset and type of the residual stream: the most bytes of a sample, over those in float32.
MOST = {
    ("base", "float32"): 0.64,
    ("base", "bfloat16"): 0.52,
    ("vit", "float32"): 0.62,
    ("vit", "bfloat16"): 0.52,
}


def saved_bytes(preset: str, stream: str | None, batch: int, target: str | None = "sm90") -> int:
    """Return the bytes kept by the kernels of a GPU, or for None of a CPU; in float32 where no stream is named."""
    attention = "native" if target is None else "sdpa" if stream is None else ATTENTION
    with torch.device("meta"):
        config = mmmae.MMMAEConfig.preset(preset, aux={}, residual_stream=stream or "float32")
        model = mmmae.FastModel(config, "native" if target is None else "triton", attention)
    return count_step(model, batch, autocast=stream and torch.bfloat16, target=target).saved_bytes


@pytest.mark.parametrize("preset", ["base", "vit"])
def test_a_sample_in_bfloat16_keeps_three_fifths_and_half_with_its_stream_in_bfloat16_too(preset):
    """Each sample adds as much; the copies of the weights in bfloat16, two bytes a number, are added once."""
    whole = saved_bytes(preset, None, 2) - saved_bytes(preset, None, 1)
    for stream in ("float32", "bfloat16"):
        first, second = (saved_bytes(preset, stream, batch) for batch in (1, 2))
        assert second - first <= MOST[preset, stream] * whole, stream
        copies = 2 * first - second
        with torch.device("meta"):
            parameters = sum(p.numel() for p in mmmae.FastModel(mmmae.MMMAEConfig.preset(preset, aux={})).parameters())
        assert 0.9 * 2 * parameters < copies < 1.01 * 2 * parameters


def test_on_a_cpu_a_step_in_bfloat16_keeps_less_than_three_fifths():
    """Whatever the batch: no copies of weights are kept there. Of a block's two sums only one is in float32."""
    whole = saved_bytes("base", None, 1, target=None)
    assert saved_bytes("base", "float32", 1, target=None) <= 0.58 * whole
    assert saved_bytes("base", "bfloat16", 1, target=None) <= 0.52 * whole

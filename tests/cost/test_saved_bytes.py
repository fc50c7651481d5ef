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


def saved_bytes(preset: str, stream: str | None, batch: int) -> int:
    """Return the bytes kept by the kernels that a GPU would run, in float32 where no stream is named."""
    with torch.device("meta"):
        config = mmmae.MMMAEConfig.preset(preset, aux={}, residual_stream=stream or "float32")
        model = mmmae.FastModel(config, "triton", "sdpa" if stream is None else ATTENTION)
    return count_step(model, batch, autocast=stream and torch.bfloat16, target="sm90").saved_bytes


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

"""Pretraining in bfloat16 learns as in float32: 200 steps on the phantom, three seeds of each (minutes)."""

import dataclasses
import statistics

import pytest

import mmmae
from mmmae.phantom import Phantom
from mmmae.training.pretrain import pretrain
from mmmae.training.settings import PretrainSettings
from tests.training.test_pretrain import losses

STEPS, WINDOW, SEEDS = 200, 20, (0, 1, 2)
MODELS = {
    "tiny": ("tiny", {}),
    "base of four blocks": ("base", {"depth": 4, "decoder_depth": 2, "aux_depth": 2}),
    "base of four blocks, stream in bfloat16": (
        "base",
        {"depth": 4, "decoder_depth": 2, "aux_depth": 2, "residual_stream": "bfloat16"},
    ),
}


def curve(folder):
    """Return the mean losses of windows of steps."""
    found = losses(folder)
    return [statistics.mean(found[step] for step in range(start, start + WINDOW)) for start in range(0, STEPS, WINDOW)]


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_in_bfloat16_are_within_the_spread_of_seeds_in_float32(tmp_path, name, capsys):
    preset, fields = MODELS[name]
    subjects = Phantom(8, image_size=64)
    config = mmmae.MMMAEConfig.preset(
        preset, image_size=64, bands=subjects.bands, aux=subjects.modalities, target="pixels", **fields
    )
    settings = PretrainSettings(steps=STEPS, batch=4, learning_rate=3e-4, checkpoint_every=STEPS, report_every=STEPS)
    curves = {}
    for precision in ("32", "bf16"):
        for seed in SEEDS:
            out = tmp_path / f"{precision}-{seed}"
            pretrain(config, subjects, out, dataclasses.replace(settings, precision=precision, seed=seed))
            curves[precision, seed] = curve(out)
    rows = []
    for window in range(STEPS // WINDOW):
        single, half = ([curves[precision, seed][window] for seed in SEEDS] for precision in ("32", "bf16"))
        spread = max(single) - min(single)
        apart = abs(statistics.mean(half) - statistics.mean(single))
        same_seed = max(abs(a - b) for a, b in zip(single, half, strict=True))
        rows.append((window, statistics.mean(single), statistics.mean(half), spread, apart, same_seed))
    with capsys.disabled():
        for window, *figures in rows:
            print(f"{name}, steps from {window * WINDOW}: " + ", ".join(f"{figure:.4f}" for figure in figures))
    # Of all windows together: where a loss jumps, which it does in a single window, the least rounding moves the jump.
    *_, spreads, aparts, _ = zip(*rows, strict=True)
    assert statistics.mean(aparts) <= statistics.mean(spreads)
    assert aparts[-1] <= spreads[-1]
    assert rows[-1][1] < 0.8 * rows[0][1], "it has not learnt anything"

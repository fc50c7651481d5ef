"""Times of a training step and of encoding: the fast model against the reference with fused attention and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

import mmmae
from mmmae.encoder import adopt_parameters

Run = Callable[[], Sequence[Tensor]]
VARIANTS = ("reference sdpa", "reference eager", "fast")
TOLERANCE = 1e-4  # of gradients, which add up rounding through all blocks twice


def models(preset: str) -> dict[str, mmmae.FastModel | mmmae.ReferenceModel]:
    """The three of them on one set of parameters."""
    torch.manual_seed(0)
    eager = mmmae.reference_model(preset)
    with torch.device("meta"):
        sdpa = mmmae.ReferenceModel(eager.config, "sdpa")
    adopt_parameters(sdpa, eager)
    return dict(zip(VARIANTS, (sdpa, eager, mmmae.fast_model(eager)), strict=True))


def volume(config: mmmae.MMMAEConfig, batch: int) -> Tensor:
    return torch.randn(batch, config.in_channels, config.bands, config.image_size, config.image_size)


def training_step(preset: str, batch: int) -> Mapping[str, Run]:
    """Forward and backward with all modalities; the optimizer's step is the same for all."""

    def step_of(model: mmmae.FastModel | mmmae.ReferenceModel) -> Run:
        def step() -> Sequence[Tensor]:
            loss = model(hsi, aux, seed=0).loss
            return [loss.detach(), *torch.autograd.grad(loss, parameters)]

        return step

    variants = models(preset)
    config, parameters = variants["fast"].config, list(variants["fast"].parameters())
    hsi = volume(config, batch)
    aux = {name: torch.randn(batch, count, config.image_size, config.image_size) for name, count in config.aux.items()}
    return {name: step_of(model) for name, model in variants.items()}


def encoding(preset: str, batch: int) -> Mapping[str, Run]:
    """All tokens, without gradients."""

    def encode_by(encoder: torch.nn.Module) -> Run:
        def encode() -> Sequence[Tensor]:
            with torch.inference_mode():
                return [encoder(hsi)]

        return encode

    variants = models(preset)
    hsi = volume(variants["fast"].config, batch)
    return {name: encode_by(model.hsi_encoder()) for name, model in variants.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_time_of_a_training_step(timed, quick, variant):
    preset, batch = ("tiny", 2) if quick else ("base", 2)
    case = f"{preset}, training step, batch {batch}"
    timed(case, variant, training_step, preset, batch, tolerance=TOLERANCE, rounds=5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_time_of_encoding(timed, quick, variant):
    batch = 1 if quick else 2
    case = f"base, encoder over all tokens, batch {batch}"
    timed(case, variant, encoding, "base", batch, tolerance=TOLERANCE, rounds=1 if quick else 5)

"""A residual stream in bfloat16: where it is in this type, and how far results are then from those in float64."""

import copy

import pytest
import torch

import mmmae
from mmmae.model.layers import Block, Conditioning, materialised

SIZES = {"image_size": 64, "depth": 4, "decoder_depth": 2}
HALF = {"residual_stream": "bfloat16"}


def inputs(config, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hsi = torch.randn(2, 1, config.bands, 64, 64, generator=generator)
    aux = {name: torch.randn(2, count, 64, 64, generator=generator) for name, count in config.aux.items()}
    return hsi.to(dtype), {name: image.to(dtype) for name, image in aux.items()}


def results(model, dtype=torch.float32, autocast=None):
    """Return results of a step in float64, under autocast to a type if one is given.

    They are loss, latent, prediction, and the gradient of each part of the model as one vector. The gradient of a
    single bias has so few numbers that its error depends on chance: other seeds give twice as much or half.
    """
    hsi, aux = inputs(model.config, dtype)
    present = {name: torch.tensor([True, False]) for name in aux}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(hsi, aux, present, seed=3)
    output.loss.backward()
    found = {"loss": [output.loss], "latent": [output.latent], "prediction": [output.prediction]}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.setdefault(f"gradient of {name.split('.')[0]}", []).append(parameter.grad)
    return {name: torch.cat([part.detach().double().flatten() for part in parts]) for name, parts in found.items()}


@pytest.mark.parametrize(
    "options", [{}, {"activation_checkpointing": True}, {"decode_fraction": 0.5, "target": "pixels"}], ids=str
)
def test_it_errs_at_most_twice_as_much_as_the_reference_wholly_in_bfloat16(options):
    torch.manual_seed(0)
    reference = mmmae.reference_model("tiny", **SIZES, **options)
    fast = mmmae.fast_model(reference.config.replace(**HALF))
    fast.load_state_dict(reference.state_dict())
    truth = results(copy.deepcopy(reference).double(), torch.float64)
    theirs = results(copy.deepcopy(reference).bfloat16(), torch.bfloat16)
    ours = results(fast, autocast=torch.bfloat16)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, wanted in truth.items():
        # A sum such as the loss may be closer to the truth by chance than its rounding would have it.
        allowed = max(2 * (theirs[name] - wanted).norm(), torch.finfo(torch.bfloat16).eps / 2 * wanted.norm())
        assert (ours[name] - wanted).norm() <= allowed, name


@pytest.mark.parametrize("changed", [False, True], ids=["plain", "a child is changed"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize(
    ("stream", "autocast", "expected"),
    [
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float16, torch.float32),
        ("bfloat16", None, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_every_block_of_encoder_and_decoder_gets_the_stream_in_its_type(
    monkeypatch, changed, recompute, stream, autocast, expected
):
    torch.manual_seed(0)
    model = mmmae.fast_model("tiny", **SIZES, residual_stream=stream, activation_checkpointing=recompute)
    if changed:
        for block in [*model.blocks, *model.decoder_blocks]:
            block.mlp.fc1.register_forward_hook(lambda *_: None)
    types = {}

    def watch(layer, name):
        forward = layer.forward

        def run(*arguments):
            out = forward(*arguments)
            types[name] = {arguments[0].dtype, materialised(out).dtype}
            return out

        monkeypatch.setattr(layer, "forward", run)

    for name, layer in model.named_modules():
        if isinstance(layer, (Block, Conditioning)) and not name.startswith("aux_encoders"):
            watch(layer, name)
    results(model, autocast=autocast)
    assert len(types) == 1 + SIZES["depth"] + SIZES["decoder_depth"]
    for name, found in types.items():
        assert found == {expected}, name


def test_the_encoder_alone_has_it_too():
    model = mmmae.fast_model("tiny", **SIZES, **HALF)
    encoder = model.hsi_encoder()
    with torch.autocast("cpu", torch.bfloat16):
        _, maps = encoder.forward_intermediates(inputs(model.config)[0])
    assert {found.dtype for found in maps} == {torch.bfloat16}

"""The fast model against the reference: same weights, same mask, same numbers."""

import pytest
import torch

import mmmae
from mmmae_kernels import random_masking
from mmmae_kernels.cpu import library as native

ALL = ("ir", "af", "thickness")
PRESENCE = {
    "all modalities": dict.fromkeys(ALL, (True, True)),
    "no modality": {},
    "one modality": {"af": (True, True)},
    "mixed presence": {"ir": (True, False), "af": (False, False), "thickness": (True, True)},
    "one sample only": {"ir": (True, False)},
}
# name, presence, whether part of the image is invalid, config
CASES = [
    *((name, name, False, {}) for name in PRESENCE),
    ("valid pixels", "all modalities", True, {}),
    ("pixel target", "all modalities", True, {"target": "pixels"}),
    ("normalised pixel target", "mixed presence", False, {"target": "pixels", "normalize_target": True}),
    ("cnn auxiliary encoder", "mixed presence", False, {"aux_encoder": "cnn"}),
]
TINY_CASES = [
    ("normalised embedding", "mixed presence", True, {"normalize_target": True}),
    ("symmetric contrast", "mixed presence", False, {"symmetric": True}),
    ("conditioning dropout", "all modalities", False, {"conditioning_dropout": 0.5}),
    ("two conditioning steps", "mixed presence", False, {"conditioning_depth": 2}),
    ("no conditioning", "all modalities", False, {"conditioning_depth": 0}),
    ("no auxiliary images", "no modality", False, {"aux": {}}),
    ("two channels", "all modalities", False, {"in_channels": 2, "aux": {"ir": 3, "af": 1, "thickness": 2}}),
    ("another patch", "all modalities", True, {"patch": (4, 14, 14), "target": "pixels"}),
    ("three decoder blocks", "all modalities", False, {"decoder_depth": 3}),
    ("nothing masked", "all modalities", False, {"mask_ratio": 0.0}),
    ("half decoded", "mixed presence", True, {"decode_fraction": 0.5}),
    ("a quarter decoded", "all modalities", False, {"decode_fraction": 0.25, "decoder_depth": 3}),
    ("half decoded, pixels", "all modalities", True, {"decode_fraction": 0.5, "target": "pixels"}),
    (
        "a quarter decoded, normalised pixels",
        "mixed presence",
        True,
        {"decode_fraction": 0.25, "target": "pixels", "normalize_target": True},
    ),
    ("nothing masked, half decoded", "no modality", False, {"mask_ratio": 0.0, "decode_fraction": 0.5}),
    ("whole spectra masked", "mixed presence", True, {"masking": "spectra"}),
    ("whole bands masked, half decoded", "all modalities", False, {"masking": "bands", "decode_fraction": 0.5}),
    ("recomputed", "mixed presence", True, {"activation_checkpointing": True}),
    ("half decoded, recomputed", "no modality", False, {"activation_checkpointing": True, "decode_fraction": 0.5}),
]


def inputs(config, presence, invalid, size=224):
    """Return a batch of two, with auxiliary images of odd sizes and NaN where a sample lacks an image."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, config.in_channels, config.bands, size, size)
    hsi = torch.randn(shape, generator=generator)
    aux, present = {}, {}
    for number, name in enumerate(presence):
        aux[name] = torch.randn(2, config.aux[name], 100 + number, 90, generator=generator)
        present[name] = torch.tensor(presence[name])
        aux[name][~present[name]] = float("nan")
    valid = None
    if invalid:
        valid = torch.ones(2, size, size, dtype=torch.bool)
        valid[0, : size // 2] = False
        valid[1, :, : size // 3] = False
    return hsi, aux, present, valid


def relative_error(value, expected):
    """Return the norm of the difference over the norm of the expected value."""
    value, expected = value.detach().double(), expected.detach().double()
    scale = expected.norm()
    return float((value - expected).norm() / (scale if scale > 0 else 1.0))


def assert_equal_models(config, presence, invalid, size=224, mask=None, **backends):
    torch.manual_seed(0)
    reference = mmmae.reference_model(config)
    fast = mmmae.fast_model(mmmae.reference_model(config), **backends)
    fast.load_state_dict(reference.state_dict(), strict=True)
    hsi, aux, present, valid = inputs(config, presence, invalid, size)
    outputs = []
    for model in (reference, fast):
        outputs.append(model(hsi, aux, present, valid, mask=mask, seed=7))
        outputs[-1].loss.backward()
    expected, given = outputs
    for name in ("loss", "loss_reconstruction", "loss_contrastive", "prediction", "latent"):
        assert relative_error(getattr(given, name), getattr(expected, name)) < 1e-5, name
    for ids, expected_ids in zip(given.mask, expected.mask, strict=True):
        assert torch.equal(ids, expected_ids)
    reference_parameters = dict(reference.named_parameters())
    assert list(reference_parameters) == [name for name, _ in fast.named_parameters()]
    for name, parameter in fast.named_parameters():
        gradient = reference_parameters[name].grad
        if gradient is None or not gradient.any():
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert gradient.isfinite().all(), name
            assert parameter.grad is not None, name
            assert relative_error(parameter.grad, gradient) < 1e-4, name


def test_fast_base_equals_reference():
    """Once; the cases are those of a small model below, and of `base` in tests/soak/test_base_equality.py."""
    assert_equal_models(mmmae.MMMAEConfig.preset("base"), PRESENCE["mixed presence"], True)


@pytest.mark.parametrize(
    ("presence", "invalid", "fields"), [case[1:] for case in CASES + TINY_CASES], ids=[c[0] for c in CASES + TINY_CASES]
)
def test_fast_tiny_equals_reference(presence, invalid, fields):
    assert_equal_models(mmmae.MMMAEConfig.preset("tiny", **fields), PRESENCE[presence], invalid)


@pytest.mark.parametrize("size", [64, 225])
def test_equal_on_volumes_that_need_registration(size):
    assert_equal_models(mmmae.MMMAEConfig.preset("tiny"), PRESENCE["mixed presence"], True, size)


@pytest.mark.parametrize(
    "backends",
    [{"kernels": "eager"}, {"attention": "eager"}, {"attention": "sdpa"}, {"attention": "native"}],
    ids=str,
)
def test_equal_with_each_backend(backends):
    if "native" in backends.values() and native.unavailable_reason() is not None:
        pytest.skip(native.unavailable_reason())
    assert_equal_models(mmmae.MMMAEConfig.preset("tiny"), PRESENCE["mixed presence"], True, **backends)


@pytest.mark.parametrize("backends", [{"kernels": "eager"}, {"attention": "eager"}, {"attention": "sdpa"}], ids=str)
def test_a_part_is_decoded_and_blocks_recomputed_with_each_backend(backends):
    config = mmmae.MMMAEConfig.preset("tiny", decode_fraction=0.5, activation_checkpointing=True)
    assert_equal_models(config, PRESENCE["mixed presence"], True, **backends)


@pytest.mark.parametrize(("keep", "fraction"), [(50, 1.0), (50, 0.5), (50, 0.25), (782, 0.5)])
def test_equal_with_a_given_mask_of_another_size(keep, fraction):
    config = mmmae.MMMAEConfig.preset("tiny", decode_fraction=fraction)
    assert_equal_models(config, PRESENCE["mixed presence"], True, mask=random_masking(2, 784, keep, seed=11))


@pytest.mark.parametrize("make", [mmmae.reference_model, mmmae.fast_model])
def test_decoding_a_part_that_is_all_equals_decoding_all(make):
    """0.9999 of 588 tokens are all 588, decoded by the code for a part of the tokens."""
    outputs, gradients = [], []
    for fraction in (1.0, 0.9999):
        torch.manual_seed(0)
        model = make("tiny", decode_fraction=fraction)
        outputs.append(model(*inputs(model.config, PRESENCE["mixed presence"], True), seed=7))
        outputs[-1].loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    whole, part = outputs
    assert part.prediction.shape == whole.prediction.shape == (2, 588, 64)
    assert relative_error(part.loss, whole.loss) < 1e-5
    assert relative_error(part.prediction, whole.prediction) < 1e-5
    for given, expected in zip(*reversed(gradients), strict=True):
        assert relative_error(given, expected) < 1e-4


def test_reference_with_sdpa_equals_reference():
    torch.manual_seed(0)
    plain = mmmae.reference_model("tiny")
    fused = mmmae.reference_model("tiny", attention="sdpa")
    fused.load_state_dict(plain.state_dict())
    hsi, aux, present, valid = inputs(plain.config, PRESENCE["mixed presence"], True)
    assert (
        relative_error(fused(hsi, aux, present, valid, seed=7).loss, plain(hsi, aux, present, valid, seed=7).loss)
        < 1e-5
    )


def test_encoder_equals_the_reference_encoder_on_all_tokens():
    torch.manual_seed(0)
    reference = mmmae.reference_model("tiny")
    hsi = torch.randn(2, 1, 12, 200, 224)
    tokens = mmmae.fast_model(reference).hsi_encoder()(hsi)
    assert tokens.shape == (2, 784, 64)
    assert relative_error(tokens, reference.hsi_encoder()(hsi)) < 1e-5


def test_encoder_equals_the_model_that_masks_nothing():
    torch.manual_seed(0)
    model = mmmae.fast_model("tiny", mask_ratio=0.0)
    hsi = torch.randn(2, 1, 12, 224, 224)
    output = model(hsi, seed=1)
    ids = output.mask.ids_restore[:, :, None].expand(-1, -1, 64)
    assert relative_error(output.latent.gather(1, ids), model.hsi_encoder()(hsi)) < 1e-5

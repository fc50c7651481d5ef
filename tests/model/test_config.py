"""The config: presets, derived shapes, JSON both ways, and messages that say what is expected."""

import json

import numpy as np
import pytest

from mmmae import MMMAEConfig


def test_base_has_the_shapes_of_the_design():
    config = MMMAEConfig.preset("base")
    assert config.grid == (4, 14, 14)
    assert (config.tokens, config.keep) == (784, 196)
    assert config.target_dim == 768
    assert (config.decode_fraction, config.decoded, config.activation_checkpointing) == (1.0, 588, False)
    assert config == MMMAEConfig()


@pytest.mark.parametrize(("fraction", "decoded"), [(1, 588), (0.999, 587), (0.5, 294), (0.25, 147), (0.001, 1)])
def test_the_predicted_tokens_are_the_fraction_of_the_masked_ones_rounded(fraction, decoded):
    config = MMMAEConfig(decode_fraction=fraction)
    assert config.decoded == config.decoded_of(588) == decoded
    assert config.decoded_of(100) == round(100 * fraction)


def test_with_nothing_masked_any_fraction_predicts_nothing():
    assert MMMAEConfig(mask_ratio=0.0, decode_fraction=0.001).decoded == 0


@pytest.mark.parametrize("name", ["base", "vit", "tiny"])
def test_json_round_trip_gives_the_same_config(name):
    wavelengths = tuple(450.0 + 50 * band for band in range(12))
    fields = {"wavelengths": wavelengths, "symmetric": True, "decode_fraction": 0.3, "activation_checkpointing": True}
    config = MMMAEConfig.preset(name, aux={"vv": 1, "dem": 2}, patch=(4, 14, 14), **fields)
    text = config.to_json()
    assert MMMAEConfig.from_json(text) == config
    assert json.loads(text)["patch"] == [4, 14, 14]
    assert json.loads(text)["wavelengths"] == list(wavelengths)
    assert MMMAEConfig.from_json(text).wavelengths == wavelengths


def test_a_config_written_before_a_field_existed_has_its_default():
    values = MMMAEConfig(mask_ratio=0.5).to_dict()
    del values["decode_fraction"], values["activation_checkpointing"], values["wavelengths"]
    assert MMMAEConfig.from_json(json.dumps(values)) == MMMAEConfig(mask_ratio=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "image_size is 0, expected a whole number >= 1"),
        ({"image_size": 230}, "image_size is 230, expected a multiple of the spatial patch 16 x 16"),
        ({"bands": 13}, "bands is 13, expected a multiple of the spectral patch 3"),
        ({"bands": "12"}, "bands is '12', expected a whole number >= 1"),
        ({"depth": True}, "depth is True, expected a whole number >= 1"),
        ({"patch": (3, 16)}, "patch is (3, 16), expected three whole numbers >= 1"),
        ({"heads": 7}, "heads is 7, expected a divisor of dim 768"),
        ({"decoder_heads": 3}, "decoder_heads is 3, expected a divisor of 512"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan, expected a number > 0"),
        ({"aux": ["ir"]}, "aux is ['ir'], expected a mapping"),
        ({"aux": {"a.b": 1}}, "not 'a.b'"),
        ({"aux": {"keys": 1}}, "not 'keys'"),
        ({"aux": {"ir": 0}}, "whole channel counts >= 1, not ir: 0"),
        ({"aux_encoder": "mlp"}, "aux_encoder is 'mlp', expected 'vit' or 'cnn'"),
        ({"aux_patch": 48}, "aux_patch is 48, expected a divisor of image_size 224"),
        ({"aux_encoder": "cnn", "aux_patch": 6}, "aux_patch is 6, expected a multiple of 4"),
        ({"aux_encoder": "cnn", "aux_dim": 48}, "aux_dim is 48, expected a multiple of 32"),
        ({"conditioning_depth": -1}, "conditioning_depth is -1, expected a whole number >= 0"),
        ({"conditioning_dropout": 1.0}, "conditioning_dropout is 1.0, expected a number in [0, 1)"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0, expected a number in [0, 1)"),
        ({"mask_ratio": 0.9999}, "mask_ratio is 0.9999, expected small enough to keep one of 784 tokens"),
        ({"decode_fraction": 0}, "decode_fraction is 0, expected a number in (0, 1]"),
        ({"decode_fraction": 1.01}, "decode_fraction is 1.01, expected a number in (0, 1]"),
        ({"decode_fraction": True}, "decode_fraction is True, expected a number in (0, 1]"),
        ({"decode_fraction": float("nan")}, "decode_fraction is nan, expected a number in (0, 1]"),
        (
            {"decode_fraction": 0.0005},
            "decode_fraction is 0.0005, expected large enough to predict one of 588 masked tokens",
        ),
        ({"wavelengths": 500.0}, "wavelengths is 500.0, expected finite numbers > 0 in nm, one a band"),
        ({"wavelengths": "blue"}, "wavelengths is 'blue', expected finite numbers > 0"),
        ({"bands": 3, "wavelengths": [450, -1, 650]}, "wavelengths has -1 for band 1, expected a finite number"),
        ({"bands": 3, "wavelengths": [450, 550, float("inf")]}, "wavelengths has inf for band 2, expected a finite"),
        ({"bands": 3, "wavelengths": [450, 550, float("nan")]}, "wavelengths has nan for band 2, expected a finite"),
        (
            {"wavelengths": [450, 550, 650]},
            "wavelengths is 3 numbers, 450 to 650, expected one in nm for each of bands = 12",
        ),
        ({"activation_checkpointing": 1}, "activation_checkpointing is 1, expected true or false"),
        ({"residual_stream": "fp8"}, "residual_stream is 'fp8', expected 'float32' or 'bfloat16'"),
        ({"target": "voxels"}, "target is 'voxels', expected 'embedding' or 'pixels'"),
        ({"temperature": 0}, "temperature is 0, expected a number > 0"),
        ({"contrastive_weight": -0.1}, "contrastive_weight is -0.1, expected a number >= 0"),
        ({"symmetric": "yes"}, "symmetric is 'yes', expected true or false"),
        ({"widht": 3}, "unknown field 'widht', must be one of image_size, bands"),
    ],
)
def test_a_wrong_value_names_the_field_the_value_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        MMMAEConfig.preset("base", **fields)
    assert message in str(error.value)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="preset is 'huge', must be one of base, vit, tiny"):
        MMMAEConfig.preset("huge")


@pytest.mark.parametrize("text", ["{", "[1]", '{"bands": 13}'])
def test_broken_json_is_a_value_error(text):
    with pytest.raises(ValueError, match="config: "):
        MMMAEConfig.from_json(text)


def test_wavelengths_are_kept_as_plain_numbers():
    config = MMMAEConfig(bands=3, wavelengths=np.array([450, 550, 650], dtype=np.float32))
    assert config.wavelengths == (450.0, 550.0, 650.0)
    assert MMMAEConfig.from_json(config.to_json()) == config


def test_other_bands_ask_for_their_wavelengths():
    config = MMMAEConfig(bands=3, wavelengths=(450, 550, 650))
    with pytest.raises(ValueError, match=r"wavelengths is 3 numbers, .* bands = 6"):
        config.replace(bands=6)
    assert config.replace(bands=6, wavelengths=None).bands == 6
    assert config.replace(mask_ratio=0.5).wavelengths == config.wavelengths


def test_a_config_does_not_change_with_the_mapping_it_was_made_from():
    aux = {"ir": 1}
    config = MMMAEConfig(aux=aux)
    aux["af"] = 1
    assert config.aux == {"ir": 1}

"""Tools of timm on the encoder and on fine-tuned models: parameter groups, feature extraction, new classifiers."""

import pytest
import torch

import mmmae
from mmmae.training.finetuning.module import parameter_groups
from mmmae.training.finetuning.settings import FinetuneSettings

MODEL = {"image_size": 32, "patch": (3, 8, 8), "aux_patch": 16, "depth": 3}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return mmmae.fast_model("tiny", **MODEL).hsi_encoder()


@pytest.fixture
def hsi():
    return torch.randn(2, 1, 12, 32, 32, generator=torch.Generator().manual_seed(1))


def finetuned(encoder):
    return mmmae.LinearClassifier(encoder, 5), mmmae.SegmentationModel(encoder, 5)


def test_formats_of_maps_hold_the_same_numbers(encoder, hsi):
    tokens, maps = encoder.forward_intermediates(hsi, 2)
    folded = encoder.forward_intermediates(hsi, [1, 2], output_fmt="NCHW", intermediates_only=True)
    rows = encoder.forward_intermediates(hsi, [1, 2], output_fmt="NLC", norm=True, intermediates_only=True)
    for volume, image in zip(maps, folded, strict=True):
        assert image.shape == (2, 64 * 4, 4, 4)
        assert torch.equal(image.unflatten(1, (64, 4)), volume)
    assert torch.equal(rows[1], tokens)
    with pytest.raises(ValueError, match="output_fmt is 'NHWC', must be one of NCTHW, NCHW, NLC"):
        encoder.forward_intermediates(hsi, output_fmt="NHWC")
    with pytest.raises(ValueError, match=r"indices is 4, expected a number of blocks in 0..3"):
        encoder.forward_intermediates(hsi, 4)


def test_with_intermediates_only_later_blocks_do_not_run(encoder, hsi):
    ran = []
    for number, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    maps = encoder.forward_intermediates(hsi, [1, 0, 1], intermediates_only=True)
    assert ran == [0, 1]
    assert torch.equal(maps[0], maps[2])
    assert not torch.equal(maps[0], maps[1])


def test_recomputation_is_turned_on_and_off(encoder, hsi):
    gradients = []
    for enable in (False, True, False):
        encoder.set_grad_checkpointing(enable)
        assert encoder.config.activation_checkpointing is enable
        assert all(block.recompute is enable for block in encoder.blocks)
        encoder.zero_grad()
        encoder.train()(hsi).square().sum().backward()
        gradients.append(encoder.pos_embed_spatial.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])
    assert torch.equal(gradients[2], gradients[0])
    model = mmmae.fast_model("tiny", **MODEL)
    model.gradient_checkpointing_enable()
    assert all(block.recompute for block in (*model.blocks, *model.decoder_blocks))
    assert model.hsi_encoder().blocks[0].recompute


def test_a_model_tells_its_size_type_and_device(encoder):
    model = mmmae.fast_model("tiny", **MODEL)
    for each in (model, encoder, *finetuned(encoder)):
        assert each.num_parameters() == sum(parameter.numel() for parameter in each.parameters())
        assert (each.embed_dim, each.num_features) == (64, 64)
        assert (each.device, each.dtype) == (torch.device("cpu"), torch.float32)
        assert each.bfloat16().dtype == torch.bfloat16
        each.float()
    assert encoder.num_parameters(exclude_embeddings=True) == encoder.num_parameters() - (4 * 4 + 4) * 64
    encoder.norm.requires_grad_(False)
    assert encoder.num_parameters(only_trainable=True) == encoder.num_parameters() - 2 * 64
    assert {"mask_token", "decoder_pos_embed_spatial"} < model.no_weight_decay()
    assert encoder.no_weight_decay() == {"pos_embed_spatial", "pos_embed_spectral"}


@pytest.mark.parametrize("kind", [0, 1], ids=["classification", "segmentation"])
def test_a_classifier_is_replaced_alone(encoder, hsi, kind):
    model = finetuned(encoder)[kind]
    before = dict(model.named_parameters())
    old = model.get_classifier()
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier() is not old
    assert model(hsi).shape[1] == 7
    changed = {name for name, parameter in model.named_parameters() if parameter is not before[name]}
    assert changed == {f"{'head.classify' if kind else 'head'}.{name}" for name, _ in old.named_parameters()}
    with pytest.raises(ValueError, match="classes is 0, expected"):
        model.reset_classifier(0)


def test_features_and_head_of_a_classifier_make_its_logits(encoder, hsi):
    model = mmmae.LinearClassifier(encoder, 5)
    tokens = model.forward_features(hsi)
    assert torch.equal(model.forward_head(tokens), model(hsi))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens.mean(1))


@pytest.mark.parametrize("kind", [0, 1], ids=["classification", "segmentation"])
def test_timm_groups_parameters_by_depth_as_this_package_does(timm, encoder, kind):
    model = finetuned(encoder)[kind]
    settings = FinetuneSettings(layer_decay=0.6, weight_decay=0.1, learning_rate=1.0)
    ours = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, settings)
        for parameter in group["params"]
    }
    groups = timm.optim.param_groups_layer_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.6
    )
    theirs = {
        id(parameter): (group["lr_scale"], group["weight_decay"]) for group in groups for parameter in group["params"]
    }
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        assert theirs[key] == pytest.approx(value)


def test_timm_makes_an_optimizer_and_a_coarse_grouping(timm, encoder):
    optimizer = timm.optim.create_optimizer_v2(encoder, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales == [0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]  # embedding, three blocks, norm
    assert len(timm.models.group_parameters(encoder, encoder.group_matcher(coarse=True))) == 3


def test_timms_feature_extractor_reads_the_encoder(timm, encoder, hsi):
    getter = timm.models._features.FeatureGetterNet(encoder, out_indices=(0, 2), norm=True)
    assert getter.feature_info.channels() == [256, 256]
    assert getter.feature_info.reduction() == [8, 8]
    maps = getter(hsi)
    assert [tuple(each.shape) for each in maps] == [(2, 256, 4, 4)] * 2
    expected = encoder.forward_intermediates(hsi, [0, 2], norm=True)[1]
    assert all(torch.equal(a, b.flatten(1, 2)) for a, b in zip(maps, expected, strict=True))

"""Segmentation models: the output of their head, what a probe trains, and files that hold the whole model."""

import json

import pytest
import torch

import mmmae
from mmmae.model.finetuned import load_finetuned, save_finetuned
from mmmae.model.heads import SegmentationModel, doubled_sizes, spread_blocks

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), aux={})


@pytest.mark.parametrize(
    "fields",
    [{}, {"patch": (12, 4, 16)}, {"image_size": 48, "patch": (6, 24, 16)}, {"patch": (3, 1, 1), "image_size": 8}],
    ids=str,
)
def test_each_pixel_has_logits_for_each_patch_and_size(fields):
    config = CONFIG.replace(**fields)
    model = SegmentationModel(mmmae.HSIEncoder(config), 5)
    assert model(torch.randn(2, 1, 12, config.image_size, config.image_size)).shape == (
        2,
        5,
        config.image_size,
        config.image_size,
    )
    assert model(torch.randn(1, 1, 12, 20, 30)).shape == (1, 5, config.image_size, config.image_size)


def test_blocks_are_spread_to_the_last_and_sizes_double_to_the_pixels():
    assert [spread_blocks(depth) for depth in (1, 2, 4, 16)] == [[0], [0, 1], [0, 1, 2, 3], [3, 7, 11, 15]]
    assert doubled_sizes((14, 14), 224) == [(28, 28), (56, 56), (112, 112), (224, 224)]
    assert doubled_sizes((3, 8), 32) == [(6, 16), (12, 32), (24, 32), (32, 32)]
    assert doubled_sizes((32, 32), 32) == []


def trained(model):
    """Give the classifier, which starts at 0, random weights."""
    for part in (model.head.classify.spectra, model.head.classify.context):
        torch.nn.init.normal_(part.weight, std=0.1)
    return model


def test_a_new_head_knows_nothing_and_learns_from_spectra_the_most():
    model = SegmentationModel(mmmae.HSIEncoder(CONFIG), 3)
    hsi = torch.randn(4, 1, 12, 32, 32)
    logits = model(hsi)
    assert logits.abs().max() < 0.5
    torch.nn.functional.cross_entropy(logits, hsi[:, 0, 0].gt(0).long()).backward()
    gradients = [part.weight.grad.norm() for part in (model.head.classify.spectra, model.head.classify.context)]
    assert gradients[0] > 2 * gradients[1]
    assert model.encoder.pos_embed_spatial.grad.any()


def test_a_trained_pixel_depends_on_its_own_spectrum_the_most():
    model = trained(SegmentationModel(mmmae.HSIEncoder(CONFIG), 3, freeze_encoder=True)).eval()
    hsi = torch.randn(1, 1, 12, 32, 32, requires_grad=True)
    model(hsi)[0, :, 7, 21].sum().backward()
    reached = hsi.grad[0, 0].abs().sum(0)
    assert divmod(int(reached.argmax()), 32) == (7, 21)
    assert 7 * 7 < int((reached > 0).sum()) < 32 * 32  # surroundings; no norm reaches all pixels


@pytest.mark.parametrize("blocks", [None, ()], ids=["encoder", "head alone"])
def test_training_classifies_some_samples_by_their_spectra_alone(blocks):
    model = trained(SegmentationModel(mmmae.HSIEncoder(CONFIG), 3, blocks=blocks))
    hsi = torch.randn(1, 1, 12, 32, 32).expand(64, -1, -1, -1, -1)
    with torch.no_grad():
        samples = model(hsi).flatten(1)
        whole = model.eval()(hsi[:1]).flatten(1)
        model.head.classify.context.weight.zero_()
        spectral = model(hsi[:1]).flatten(1)
    alone, joined = ((samples - logits).norm(dim=1) < 1e-4 * logits.norm() for logits in (spectral, whole))
    assert (alone ^ joined).all()
    assert 4 <= int(alone.sum()) <= 32  # 16 of 64 are expected


def test_with_sides_of_1_a_pixel_is_classified_by_its_own_spectrum_where_surroundings_do_not_count():
    model = trained(SegmentationModel(mmmae.HSIEncoder(CONFIG), 3, blocks=(), sides=(1,))).eval()
    torch.nn.init.zeros_(model.head.classify.context.weight)
    hsi = torch.randn(1, 1, 12, 32, 32, requires_grad=True)
    model(hsi)[0, :, 7, 21].sum().backward()
    assert hsi.grad[0, 0].abs().sum(0).nonzero().tolist() == [[7, 21]]


def test_a_head_without_maps_does_not_run_the_encoder(monkeypatch):
    model = trained(SegmentationModel(mmmae.HSIEncoder(CONFIG), 3, blocks=()))
    monkeypatch.setattr(model.encoder, "forward_intermediates", None)
    model(torch.randn(1, 1, 12, 20, 30)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    with pytest.raises(ValueError, match="hsi has 11 bands"):
        model(torch.randn(1, 1, 11, 32, 32))


def test_a_frozen_encoder_gets_no_gradient_and_a_free_one_does():
    for frozen in (True, False):
        model = trained(SegmentationModel(mmmae.HSIEncoder(CONFIG), 3, freeze_encoder=frozen))
        model(torch.randn(1, 1, 12, 32, 32)).square().mean().backward()
        assert model.head.classify.spectra.weight.grad.any()
        assert any(parameter.grad is not None for parameter in model.encoder.parameters()) is not frozen


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_a_saved_model_gives_the_same_logits(tmp_path, kind):
    encoder = mmmae.HSIEncoder(CONFIG)
    model = (
        trained(SegmentationModel(encoder, 3, width=32, blocks=(1,), sides=(1, 5)))
        if kind == "segmentation"
        else mmmae.LinearClassifier(encoder, 3)
    )
    save_finetuned(tmp_path / "model", model, ["a", "b", "c"])
    back, classes = load_finetuned(tmp_path / "model")
    hsi = torch.randn(2, 1, 12, 32, 32)
    assert classes == ["a", "b", "c"]
    assert torch.equal(back(hsi), model.eval()(hsi))
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in back.parameters())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_and_other_files_are_refused_by_name(tmp_path):
    save_finetuned(tmp_path, SegmentationModel(mmmae.HSIEncoder(CONFIG), 3), ["a", "b", "c"])
    config, weights = (tmp_path / name for name in ("config.json", "model.safetensors"))
    whole = config.read_text(), weights.read_bytes()
    with pytest.raises(FileNotFoundError, match="none"):
        load_finetuned(tmp_path / "none")
    for text in ("{", "[]", CONFIG.to_json(), json.dumps({**json.loads(whole[0]), "task": "detection"})):
        config.write_text(text)
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_finetuned(tmp_path)
    config.write_text(json.dumps({**json.loads(whole[0]), "classes": ["a", "b"]}))
    with pytest.raises(ValueError, match="classify"):
        load_finetuned(tmp_path)
    config.write_text(whole[0])
    weights.write_bytes(whole[1][:-100])
    with pytest.raises(ValueError, match="do not fit together as a fine-tuned model"):
        load_finetuned(tmp_path)


@pytest.mark.parametrize(("head", "found"), [({}, 1), ({"format": 2}, 2)], ids=["1", "2"])
def test_a_model_with_a_head_of_before_is_refused(tmp_path, head, found):
    save_finetuned(tmp_path, SegmentationModel(mmmae.HSIEncoder(CONFIG), 3), ["a", "b", "c"])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head"]["format"]
    config["head"] |= head
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = f"its head has format {found}, expected 3: fine-tune anew, or load it with the version"
    with pytest.raises(ValueError, match=message):
        load_finetuned(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"width": 20}, "width is 20, expected a multiple of 16"),
        ({"blocks": (2,)}, r"blocks is \[2\], expected numbers in -2..1"),
        ({"sides": (1, 4)}, "sides is 1, 4, expected different odd numbers of pixels like 1, 3, 7"),
        ({"sides": (3, 3)}, "sides is 3, 3"),
        ({"sides": ()}, "sides is none"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SegmentationModel(mmmae.HSIEncoder(CONFIG), **{"classes": 3, **arguments})

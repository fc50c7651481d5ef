"""The encoder alone: maps, files, other grids, and the linear classifier."""

import json

import pytest
import torch
from safetensors import safe_open

import mmmae
from mmmae.model.finetuned import save_finetuned
from tests import permissions


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mmmae.fast_model("tiny", depth=3)


@pytest.fixture
def hsi():
    return torch.randn(2, 1, 12, 224, 224, generator=torch.Generator().manual_seed(1))


def test_it_shares_the_parameters_of_its_model(model):
    encoder = model.hsi_encoder()
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters[name] for name, parameter in encoder.named_parameters())


def test_it_registers_any_size(model, hsi):
    encoder = model.hsi_encoder()
    smaller = torch.nn.functional.interpolate(hsi[:, 0], size=(100, 150), mode="bilinear")[:, None]
    assert encoder(smaller).shape == (2, 784, 64)
    with pytest.raises(ValueError, match="expected bands = 12"):
        encoder(hsi[:, :, :6])


def test_intermediates_are_the_blocks_own(model, hsi):
    encoder = model.hsi_encoder()
    tokens, maps = encoder.forward_intermediates(hsi)
    assert torch.equal(tokens, encoder(hsi))
    assert torch.equal(tokens, encoder.forward_features(hsi))
    assert [tuple(m.shape) for m in maps] == [(2, 64, 4, 14, 14)] * 3
    _, chosen = encoder.forward_intermediates(hsi, [-1, 0])
    assert torch.equal(chosen[0], maps[2])
    assert torch.equal(chosen[1], maps[0])
    _, (last,) = encoder.forward_intermediates(hsi, [-1], normalize=True)
    assert torch.equal(last.flatten(2).transpose(1, 2), tokens)


def test_a_map_has_each_token_in_its_place(model, hsi):
    encoder = model.hsi_encoder()
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.proj.weight.zero_()
    changed = hsi.clone()
    changed[0, 0, 3:6, 16:32, 32:48] += 1.0
    _, (before,) = encoder.forward_intermediates(hsi, [0])
    _, (after,) = encoder.forward_intermediates(changed, [0])
    moved = (before - after).abs().sum(1)
    assert moved[0, 1, 1, 2] > 0
    moved[0, 1, 1, 2] = 0
    assert not moved.any()


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_of_no_block_is_refused(model, hsi, index):
    with pytest.raises(ValueError, match=rf"indices has {index}, expected numbers in -3..2"):
        model.hsi_encoder().forward_intermediates(hsi, [index])


def test_it_comes_back_from_its_folder(model, hsi, tmp_path):
    encoder = model.hsi_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == ["config.json", "model.safetensors"]
    back = mmmae.HSIEncoder.from_pretrained(tmp_path / "encoder")
    assert back.config == encoder.config
    assert torch.equal(back(hsi), encoder(hsi))
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in back.parameters())
    with safe_open(tmp_path / "encoder" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(encoder.state_dict())


@pytest.mark.parametrize("kind", [mmmae.LinearClassifier, mmmae.SegmentationModel])
def test_it_comes_out_of_the_folder_of_a_fine_tuned_model(model, hsi, tmp_path, kind):
    encoder = model.hsi_encoder()
    save_finetuned(tmp_path, kind(encoder, 2), ["a", "b"])
    back = mmmae.HSIEncoder.from_pretrained(tmp_path)
    assert back.config == encoder.config
    assert torch.equal(back(hsi), encoder(hsi))
    with pytest.raises(ValueError, match="holds only an encoder, expected a whole model"):
        mmmae.FastModel.from_pretrained(tmp_path)


def test_saving_again_replaces_and_leaves_nothing_else(model, tmp_path):
    encoder = model.hsi_encoder()
    encoder.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        encoder.norm.weight.fill_(3.0)
    with (tmp_path / "model.safetensors").open("rb") as reader:
        encoder.save_pretrained(tmp_path)
        assert reader.read() == before  # a reader that has the old file open still reads all of it
    assert (mmmae.HSIEncoder.from_pretrained(tmp_path).norm.weight == 3).all()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_save_leaves_the_old_files(model, tmp_path, monkeypatch):
    encoder = model.hsi_encoder()
    encoder.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("mmmae.model.pretrained.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        encoder.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "fields", [{"image_size": 96}, {"image_size": 448}, {"bands": 60}, {"bands": 6, "image_size": 112}]
)
def test_position_embeddings_are_resized_to_other_grids(model, tmp_path, fields):
    model.hsi_encoder().save_pretrained(tmp_path)
    for encoder in (mmmae.HSIEncoder.from_pretrained(tmp_path, **fields), model.hsi_encoder(**fields)):
        groups, rows, columns = encoder.config.grid
        assert encoder.pos_embed_spatial.shape == (1, rows * columns, 64)
        assert encoder.pos_embed_spectral.shape == (1, groups, 64)
        size, bands = encoder.config.image_size, encoder.config.bands
        assert encoder(torch.zeros(1, 1, bands, size, size)).shape == (1, groups * rows * columns, 64)
    assert model.pos_embed_spatial.shape == (1, 196, 64)


def test_resizing_keeps_a_smooth_position_embedding_in_place(model):
    ramp = torch.linspace(-1, 1, 14)
    with torch.no_grad():
        model.pos_embed_spatial[0] = (ramp[:, None] + 2 * ramp).flatten()[:, None].expand(196, 64)
        model.pos_embed_spectral[0] = torch.linspace(0, 3, 4)[:, None].expand(4, 64)
    encoder = model.hsi_encoder(image_size=448, bands=24)
    spatial = encoder.pos_embed_spatial[0, :, 0].view(28, 28)
    centres = (torch.arange(28) + 0.5) / 28 * 14 - 0.5  # in steps of the old grid
    expected = (-1 + 2 * centres / 13)[:, None] + 2 * (-1 + 2 * centres / 13)
    assert (spatial - expected)[4:-4, 4:-4].abs().max() < 1e-4
    spectral = encoder.pos_embed_spectral[0, :, 0]
    assert torch.allclose(spectral[1:-1], (torch.arange(8)[1:-1] + 0.5) / 2 - 0.5)


def test_grids_that_are_not_square_are_kept_and_resized(hsi, tmp_path):
    model = mmmae.fast_model("tiny", patch=(3, 32, 8))
    assert torch.equal(model.hsi_encoder().pos_embed_spatial, model.pos_embed_spatial)
    model.hsi_encoder().save_pretrained(tmp_path)
    ramp = torch.linspace(-1, 1, 28).repeat(7)
    with torch.no_grad():
        model.pos_embed_spatial[0] = ramp[:, None].expand(196, 64)
    resized = model.hsi_encoder(image_size=448).pos_embed_spatial[0, :, 0].view(14, 56)
    assert (resized - resized[:1]).abs().max() < 1e-5
    assert (resized[0, 4:-4].diff() - 1 / 27).abs().max() < 1e-5
    assert mmmae.HSIEncoder.from_pretrained(tmp_path, image_size=448).pos_embed_spatial.shape == (1, 14 * 56, 64)


def test_weights_of_another_grid_than_their_config_says_are_refused(model, tmp_path):
    model.hsi_encoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_size": 240}))
    with pytest.raises(ValueError, match=r"pos_embed_spatial has shape \[1, 196, 64\], expected \[1, 225, D\]"):
        mmmae.HSIEncoder.from_pretrained(tmp_path)


def test_another_patch_does_not_fit_the_weights(model, tmp_path):
    model.hsi_encoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)the weights do not fit the config: .*patch_embed.proj.weight"):
        mmmae.HSIEncoder.from_pretrained(tmp_path, patch=[3, 8, 8])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"", "not a complete safetensors file"),
        ("model.safetensors", None, "not a complete safetensors file"),
        ("config.json", b"{", "config.json: config: not valid JSON"),
        ("config.json", json.dumps({"depth": -1}).encode(), "config.json: config: depth is -1"),
    ],
    ids=["empty weights", "truncated weights", "broken config", "wrong config"],
)
def test_a_broken_file_is_a_value_error_that_names_it(model, tmp_path, name, content, message):
    model.hsi_encoder().save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=message):
        mmmae.HSIEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_without_permission_is_not_called_missing_or_broken(model, tmp_path, name):
    model.hsi_encoder().save_pretrained(tmp_path)
    (tmp_path / name).chmod(0)
    with permissions.obeyed(), pytest.raises(PermissionError, match=name):
        mmmae.HSIEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(model, tmp_path, name):
    model.hsi_encoder().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        mmmae.HSIEncoder.from_pretrained(tmp_path)


def test_a_linear_probe_trains_its_head_alone(model, hsi):
    probe = mmmae.LinearClassifier(model.hsi_encoder(), 5, freeze_encoder=True)
    logits = probe(hsi)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert probe.head.weight.grad is not None
    assert all(parameter.grad is None for parameter in probe.encoder.parameters())
    full = mmmae.LinearClassifier(model.hsi_encoder(), 5)
    full(hsi).square().sum().backward()
    assert full.encoder.patch_embed.proj.weight.grad.any()
    with pytest.raises(ValueError, match="classes is 0"):
        mmmae.LinearClassifier(model.hsi_encoder(), 0)

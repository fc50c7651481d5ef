"""Models and encoders in folders and on the Hub, tested without a network."""

import copy
import json
import pickle

import huggingface_hub
import pytest
import torch

import mmmae

FIELDS = {"image_size": 32, "patch": (3, 8, 8), "aux_patch": 8, "aux": {"ir": 1, "dem": 2}}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mmmae.fast_model("tiny", **FIELDS)


@pytest.fixture
def hsi():
    return torch.randn(2, 1, 12, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replace the Hub by a folder: files uploaded to it can be downloaded."""

    class Repository:
        repo_id = "lab/encoder"

    def upload_folder(self, *, repo_id, folder_path, commit_message, **options):
        target = tmp_path / "hub" / repo_id
        target.mkdir(parents=True)
        for path in folder_path.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return f"https://hub/{repo_id}/commit/{commit_message}"

    def snapshot_download(repo_id, *, allow_patterns, **options):
        if not (tmp_path / "hub" / repo_id).is_dir():
            raise FileNotFoundError("no repository\nand more")
        return str(tmp_path / "hub" / repo_id)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, **options: Repository())
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("mmmae.model.pretrained.snapshot_download", snapshot_download)
    return tmp_path / "hub"


def test_a_model_comes_back_from_its_folder(model, hsi, tmp_path):
    assert model.save_pretrained(tmp_path / "model") is None
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    back = mmmae.FastModel.from_pretrained(tmp_path / "model")
    assert type(back) is mmmae.FastModel
    assert back.config == model.config
    aux = {"ir": torch.randn(2, 1, 32, 32)}
    for one, other in zip(back(hsi, aux, seed=1)[:5], model(hsi, aux, seed=1)[:5], strict=True):
        assert torch.equal(one, other)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in back.parameters())
    back(hsi, aux, seed=1).loss.backward()


def test_a_model_on_another_grid_has_all_positions_resized(model, tmp_path):
    model.save_pretrained(tmp_path)
    back = mmmae.FastModel.from_pretrained(tmp_path, image_size=64, bands=6)
    assert back.pos_embed_spatial.shape == back.decoder_pos_embed_spatial[..., :1].expand(1, 64, 64).shape
    assert back.decoder_pos_embed_spectral.shape == (1, 2, 32)
    assert back.aux_encoders["dem"].pos_embed.shape == (1, 64, 32)
    aux = {"dem": torch.zeros(1, 2, 64, 64)}
    assert back(torch.zeros(1, 1, 6, 64, 64), aux).loss.isfinite()


def test_an_encoder_is_read_from_the_folder_of_its_model(model, hsi, tmp_path):
    model.save_pretrained(tmp_path)
    encoder = mmmae.HSIEncoder.from_pretrained(tmp_path)
    assert torch.equal(encoder(hsi), model.hsi_encoder()(hsi))
    assert encoder.config == model.hsi_encoder().config
    assert mmmae.HSIEncoder.from_pretrained(tmp_path, image_size=40).config.grid == (4, 5, 5)


def test_a_model_is_not_read_from_the_folder_of_an_encoder(model, tmp_path):
    model.hsi_encoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds only an encoder, .* mmmae\.HSIEncoder\.from_pretrained reads it"):
        mmmae.FastModel.from_pretrained(tmp_path)


def test_weights_that_a_folder_lacks_or_has_too_many_are_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)do not fit the config: .*aux_encoders\.ir"):
        mmmae.FastModel.from_pretrained(tmp_path, aux={})
    with pytest.raises(ValueError, match=r"(?s)do not fit the config: .*blocks\.2\.norm1"):
        mmmae.HSIEncoder.from_pretrained(tmp_path, depth=3)
    with pytest.raises(ValueError, match="config: unknown field 'widht'"):
        mmmae.FastModel.from_pretrained(tmp_path, widht=3)


def test_a_folder_that_is_a_file_and_a_config_that_is_no_text_are_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"file: is not a folder"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config\.json: not UTF-8 text"):
        mmmae.FastModel.from_pretrained(tmp_path)


def test_kernels_and_attention_are_chosen_when_it_is_read(model, hsi, tmp_path):
    model.save_pretrained(tmp_path)
    eager = mmmae.FastModel.from_pretrained(tmp_path, kernels="eager", attention="eager")
    assert (eager.kernels, eager.attention) == ("eager", "eager")
    assert torch.allclose(eager(hsi, seed=1).loss, model(hsi, seed=1).loss, rtol=1e-5)


def test_a_card_is_written_when_asked_for_and_other_files_stay(model, tmp_path):
    (tmp_path / "normalization.json").write_text("{}")
    model.hsi_encoder().save_pretrained(tmp_path, model_card_kwargs={}, repo_id="lab/encoder")
    names = ["README.md", "config.json", "model.safetensors", "normalization.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "mmmae"
    assert "hyperspectral" in card.data.tags
    assert 'mmmae.HSIEncoder.from_pretrained("lab/encoder")' in card.text
    assert json.dumps(model.hsi_encoder().config.to_dict(), indent=2) in card.text


def test_what_is_pushed_can_be_read_by_its_name(model, hsi, hub):
    address = model.hsi_encoder().push_to_hub("lab/encoder", commit_message="one")
    assert address == "https://hub/lab/encoder/commit/one"
    assert sorted(path.name for path in (hub / "lab" / "encoder").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    encoder = mmmae.HSIEncoder.from_pretrained("lab/encoder")
    assert torch.equal(encoder(hsi), model.hsi_encoder()(hsi))


def test_saving_can_push_as_well(model, hub, tmp_path):
    address = model.save_pretrained(tmp_path / "m", push_to_hub=True, repo_id="lab/encoder", commit_message="two")
    assert address == "https://hub/lab/encoder/commit/two"
    assert mmmae.FastModel.from_pretrained("lab/encoder").config == model.config


def test_a_name_that_is_neither_here_nor_there_is_one_error(hub, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="lab/absent: no such folder, and it can't be read from the Hub: no"):
        mmmae.FastModel.from_pretrained("lab/absent")
    monkeypatch.setattr("mmmae.model.pretrained.snapshot_download", pytest.fail)  # a path is never looked up
    for name in (tmp_path / "lab" / "absent", "absent", "./lab/absent", "runs/lab/absent"):
        with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
            mmmae.FastModel.from_pretrained(name)


def test_a_folder_comes_before_the_hub(model, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("lab/encoder")
    monkeypatch.setattr("mmmae.model.pretrained.snapshot_download", pytest.fail)
    assert mmmae.FastModel.from_pretrained("lab/encoder").config == model.config


def test_models_are_still_copied_and_shared(model, hsi):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config == model.config
        assert torch.equal(twin(hsi, seed=0).loss, model(hsi, seed=0).loss)
    shared = mmmae.fast_model(model)
    assert all(one is other for one, other in zip(shared.parameters(), model.parameters(), strict=True))

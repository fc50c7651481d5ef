"""Import of SpectralGPT's checkpoints: results of the encoder, weights left out, and files that are refused."""

import argparse
import os
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import mmmae
from mmmae.cli import main
from mmmae.model.imports import import_spectralgpt

DIM, HEADS, DEPTH, HIDDEN, BANDS, SIZE = 64, 2, 2, 96, 6, 32
PATCH = (3, 8, 8)


class Block(nn.Module):
    def __init__(self, qkv_bias):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attn = nn.Module()
        for name in "qkv":
            setattr(self.attn, name, nn.Linear(DIM, DIM, bias=qkv_bias))
        self.attn.proj = nn.Linear(DIM, DIM)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x):
        normed = self.norm1(x)
        heads = []
        for part in zip(*(getattr(self.attn, name)(normed).chunk(HEADS, dim=-1) for name in "qkv"), strict=True):
            q, k, v = part
            heads.append(torch.softmax(torch.einsum("bnd,bmd->bnm", q, k) * (DIM / HEADS) ** -0.5, dim=-1) @ v)
        x = x + self.attn.proj(torch.cat(heads, dim=-1))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class Network(nn.Module):
    """The encoder of SpectralGPT, by its description: separate q, k and v, separable positions."""

    def __init__(self, qkv_bias=True):
        super().__init__()
        side, groups = SIZE // PATCH[1], BANDS // PATCH[0]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(1, DIM, PATCH, PATCH)
        self.pos_embed_spatial = nn.Parameter(torch.randn(1, side**2, DIM))
        self.pos_embed_temporal = nn.Parameter(torch.randn(1, groups, DIM))
        self.blocks = nn.ModuleList(Block(qkv_bias) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        for parameter in self.parameters():  # norms and biases too must matter
            nn.init.normal_(parameter, std=0.2)

    def forward(self, hsi):
        maps = self.patch_embed.proj(hsi)  # [B, D, t, h, w]
        rows = [m.flatten(2).transpose(1, 2) + self.pos_embed_spatial for m in maps.unbind(2)]
        rows = [row + self.pos_embed_temporal[:, t : t + 1] for t, row in enumerate(rows)]
        x = torch.cat(rows, dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def checkpoint_of(network, *, prefix="", decoder=True):
    weights = {prefix + name: weight.clone() for name, weight in network.state_dict().items()}
    if decoder:
        weights |= {f"{prefix}decoder_blocks.{n}.attn.q.weight": torch.zeros(16, 16) for n in range(2)}
        weights |= {f"{prefix}mask_token": torch.zeros(1, 1, 16), f"{prefix}decoder_pred.bias": torch.zeros(3)}
    return weights


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def hsi():
    return torch.randn(3, 1, BANDS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda weights: {"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}, ""),
        (lambda weights: {"state_dict": weights}, "module."),
        (lambda weights: {"model_state_dict": weights, "model_ema": None}, "_orig_mod.module."),
        (lambda weights: {"epoch": 3, "model_ema": {"module": weights}}, "model.encoder."),
        (lambda weights: weights, "model._orig_mod.backbone."),
        (lambda weights: weights, ""),
    ],
    ids=[
        "under model, with args",
        "parallel",
        "compiled",
        "averaged, in a larger model",
        "in a compiled model",
        "bare",
    ],
)
def test_the_encoder_computes_what_the_network_does(hsi, tmp_path, qkv_bias, wrap, prefix):
    torch.manual_seed(0)
    network = Network(qkv_bias)
    path = saved(tmp_path / "c.pth", wrap(checkpoint_of(network, prefix=prefix)))
    encoder, _ = import_spectralgpt(path, heads=HEADS)
    with torch.no_grad():
        tokens, expected = encoder(hsi), network(hsi)
    assert (tokens - expected).norm() < 1e-5 * expected.norm()  # float32, another order of summation


def test_a_safetensors_file_serves_as_well(network, hsi, tmp_path):
    save_file(checkpoint_of(network), tmp_path / "c.safetensors")
    encoder, _ = import_spectralgpt(tmp_path / "c.safetensors", heads=HEADS)
    with torch.no_grad():
        assert torch.allclose(encoder(hsi), network(hsi), rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_the_config_follows_from_the_shapes(network, tmp_path):
    encoder, _ = import_spectralgpt(saved(tmp_path / "c.pth", checkpoint_of(network)))
    config = encoder.config
    assert (config.dim, config.depth, config.heads, config.bands, config.image_size) == (DIM, DEPTH, 1, BANDS, SIZE)
    assert config.patch == PATCH
    assert config.mlp_ratio * DIM == HIDDEN
    assert config.aux == {}


def test_each_weight_is_accounted_for(network, tmp_path):
    weights = checkpoint_of(network) | {"pos_embed_class": torch.zeros(1, 1, DIM), "head.weight": torch.zeros(5, DIM)}
    del weights["norm.bias"], weights["blocks.1.mlp.fc2.bias"]
    encoder, entries = import_spectralgpt(saved(tmp_path / "c.pth", weights), image_size=48, bands=9)
    found = {entry.name: entry for entry in entries}
    assert found["blocks.*.attn.k.weight"][1:] == (DEPTH, "loaded", "into attn.qkv.weight")
    assert ("blocks.*.mlp.fc2.bias", 1, "missing", "set to 0") in entries
    assert found["decoder_blocks.*.attn.q.weight"][1:] == (2, "left out", "of the decoder")
    assert found["pos_embed_class"].outcome == "left out"
    assert "class token" in found["pos_embed_class"].reason
    assert found["head.weight"].reason == "of another task"
    assert found["pos_embed_temporal"][2:] == ("resized", "2 x 4 x 4 to 3 x 6 x 6 tokens")
    assert found["norm.bias"][1:] == (1, "missing", "set to 0")
    in_file = [entry for entry in entries if entry.outcome != "missing"]
    assert sum(entry.weights for entry in in_file) == len(weights)
    assert not encoder.norm.bias.any()
    assert not encoder.blocks[1].mlp.fc2.bias.any()
    assert encoder(torch.zeros(1, 1, 9, 48, 48)).shape == (1, 3 * 36, DIM)


def test_the_command_writes_a_folder_and_lists(network, hsi, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path = saved(tmp_path / "c.pth", {"model": checkpoint_of(network)})
    assert main(["import-spectralgpt", str(path), "--out", str(tmp_path / "encoder"), "--heads", str(HEADS)]) == 0
    printed = capsys.readouterr().out
    for expected in ("pos_embed_temporal", "into attn.qkv.weight", "of the decoder", "2 heads", "3 x 8 x 8"):
        assert expected in printed
    encoder = mmmae.HSIEncoder.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        assert torch.allclose(encoder(hsi), network(hsi), rtol=1e-4, atol=1e-4)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(network, tmp_path, capsys):
    made = tmp_path / "made"
    path = saved(tmp_path / "c.pth", {"model": checkpoint_of(network), "extra": Harmful(made)})
    assert main(["import-spectralgpt", str(path), "--out", str(tmp_path / "encoder")]) == 2
    assert "c.pth: refused: it holds an object, posix.mkdir" in capsys.readouterr().err
    assert not made.exists()
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("patch_embed.proj.weight"),
            "not an encoder of SpectralGPT: it has no patch_embed.proj",
        ),
        (lambda w: w.pop("blocks.1.attn.k.weight"), "it has no blocks.1.attn.k.weight"),
        (lambda w: w.pop("blocks.0.attn.v.bias"), "it has no blocks.0.attn.v.bias"),
        (lambda w: w.update({"blocks.7.norm1.weight": torch.ones(DIM)}), "it has no blocks.2"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.ones(DIM, 3, 8, 8)}), "expected .D, C, bands"),
        (lambda w: w.update({"pos_embed_spatial": torch.ones(1, 17, DIM)}), "17 rows, expected as many as"),
        (lambda w: w.update({"pos_embed_temporal": torch.ones(2, DIM)}), "pos_embed_temporal has shape"),
        (lambda w: w.update({"blocks.0.mlp.fc2.weight": torch.ones(DIM, 5)}), "size mismatch for blocks.0.mlp.fc2"),
        (lambda w: w.update({"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}), "fc1.weight has shape .., expected"),
        (
            lambda w: w.update({"blocks.1.attn.q.weight": torch.ones(DIM, 5)}),
            r"blocks.1.attn.q.weight has shape .64, 5., expected .64, 64.",
        ),
        (
            lambda w: w.update({"blocks.1.attn.q.bias": torch.tensor(1.0)}),
            "blocks.1.attn.q.bias has shape .., expected",
        ),
        (lambda w: w.update({"norm.weight": torch.ones(DIM, device="meta")}), "norm.weight is not a dense"),
        (lambda w: w.update({"norm.weight": torch.ones(DIM).to_sparse()}), "norm.weight is not a dense"),
        (
            lambda w: w.update({"norm.weight": torch.ones(DIM, dtype=torch.complex64)}),
            "norm.weight is not a dense",
        ),
        (lambda w: w["norm.weight"].fill_(float("nan")), "norm.weight has NaN or infinity"),
    ],
)
def test_a_network_of_other_parts_is_an_error_that_names_the_part(network, tmp_path, change, message):
    weights = checkpoint_of(network)
    change(weights)
    with pytest.raises(ValueError, match=rf"(?s)c\.pth: .*{message}"):
        import_spectralgpt(saved(tmp_path / "c.pth", weights), heads=HEADS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 5}, "heads is 5"),
        ({"heads": 0}, "heads is 0"),
        ({"image_size": 33}, "image_size is 33"),
        ({"bands": 7}, "bands is 7"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(network, tmp_path, fields, message):
    with pytest.raises(ValueError, match=f"{message}, expected"):
        import_spectralgpt(saved(tmp_path / "c.pth", checkpoint_of(network)), **fields)


def test_a_broken_file_is_named(network, tmp_path):
    path = saved(tmp_path / "c.pth", checkpoint_of(network))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"c\.pth: not a checkpoint of PyTorch, or a broken one"):
        import_spectralgpt(path)
    with pytest.raises(ValueError, match=r"d\.pth: holds a list"):
        import_spectralgpt(saved(tmp_path / "d.pth", [1, 2]))
    (tmp_path / "e.pth").write_bytes(pickle.dumps([1, 2], protocol=4))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"e\.pth: refused: it is a plain pickle"):
            import_spectralgpt(tmp_path / "e.pth")
    assert warned == []
    with pytest.raises(FileNotFoundError, match="no such file, expected a checkpoint"):
        import_spectralgpt(tmp_path / "absent.pth")

"""The encoder as a backbone of TerraTorch: its registry, its model factory, and its command line on the example."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mmmae
from mmmae.data import Normalization

EXAMPLE = Path(__file__).parents[2] / "examples" / "terratorch"
MODEL = {"image_size": 32, "patch": (3, 8, 8), "aux_patch": 16}
RUN = """
import sys
sys.path.insert(0, {tests!r})
import torchvision_operators
from terratorch.__main__ import main
sys.argv = ["terratorch", *{arguments!r}]
main()
"""


@pytest.fixture
def registry(terratorch):
    importlib.import_module("mmmae.interop.terratorch")
    return terratorch.BACKBONE_REGISTRY


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = mmmae.fast_model("tiny", **MODEL)
    model.save_pretrained(tmp_path / "encoder")
    statistics = Normalization({"hsi": [(100.0 * band, 100.0 * band + 50, 100.0 * band + 100) for band in range(12)]})
    statistics.save(tmp_path / "encoder" / "normalization.json")
    return tmp_path / "encoder"


def test_the_registry_builds_a_pretrained_backbone(registry, folder):
    assert "mmmae_encoder" in registry
    backbone = registry.build("mmmae_encoder", folder=str(folder), normalize=True)
    assert backbone.out_channels == [64 * 4, 64 * 4]
    image = 1000 * torch.rand(2, 12, 40, 24)
    maps = backbone(image)
    assert [tuple(each.shape) for each in maps] == [(2, 256, 4, 4)] * 2
    encoder = mmmae.HSIEncoder.from_pretrained(folder)
    normalised = Normalization.load(folder / "normalization.json").apply("hsi", image)
    last = encoder(normalised[:, None]).transpose(1, 2).unflatten(2, (4, 4, 4)).flatten(1, 2)
    assert torch.equal(maps[-1], last)
    plain = registry.build("mmmae_encoder", folder=str(folder), indices=[-1])
    assert torch.equal(plain(normalised)[0], last)
    untrained = registry.build("mmmae_encoder", folder=str(folder), indices=[-1], pretrained=False)
    assert not torch.equal(untrained(normalised)[0], last)
    assert registry.build("mmmae_encoder", preset="tiny", bands=24).encoder.config.bands == 24
    with pytest.raises(ValueError, match="normalize is True, expected a folder"):
        registry.build("mmmae_encoder", normalize=True)


def test_its_factory_puts_a_decoder_and_adapters_of_peft_on_the_backbone(terratorch, registry, folder):
    model = terratorch.MODEL_FACTORY_REGISTRY.build("EncoderDecoderFactory").build_model(
        task="segmentation",
        backbone="mmmae_encoder",
        backbone_kwargs={"folder": str(folder)},
        decoder="UperNetDecoder",
        decoder_channels=16,
        num_classes=3,
        peft_config={"method": "LORA", "peft_config_kwargs": {"target_modules": ["qkv"], "r": 2}},
    )
    logits = model(torch.randn(2, 12, 40, 24)).output
    assert logits.shape == (2, 3, 40, 24)
    logits.square().sum().backward()
    trained = {name for name, p in model.encoder.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_its_command_line_trains_the_example(terratorch, folder, tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
    shutil.copytree(EXAMPLE, tmp_path / "example")
    folder.rename(tmp_path / "example" / "encoder")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        place = tmp_path / "example" / "data" / split
        place.mkdir(parents=True)
        for number in range(4):
            for name, values in (
                ("image", rng.normal(1000, 300, (12, 32, 32)).astype(np.float32)),
                ("mask", rng.integers(0, 3, (1, 32, 32)).astype(np.int16)),
            ):
                options = {"height": 32, "width": 32, "count": len(values), "dtype": values.dtype}
                with rasterio.open(place / f"{number}_{name}.tif", "w", driver="GTiff", **options) as file:
                    file.write(values)
    arguments = ["fit", "--config", "segmentation.yaml", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN.format(tests=str(Path(__file__).parent), arguments=arguments)],
        cwd=tmp_path / "example",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoints = sorted((tmp_path / "example" / "runs").rglob("*step=2*.ckpt"))
    assert checkpoints, done.stdout
    saved = torch.load(checkpoints[0], weights_only=False)["state_dict"]
    (trained,) = (weight for name, weight in saved.items() if name.endswith("encoder.blocks.0.attn.qkv.weight"))
    before = mmmae.HSIEncoder.from_pretrained(tmp_path / "example" / "encoder").blocks[0].attn.qkv.weight
    assert 0 < (trained - before).abs().max() < 0.001  # at most two steps of 1e-4

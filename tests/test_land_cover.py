"""The experiment on real scenes runs, goes on where it was stopped, and holds out what it says."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def land_cover():
    spec = importlib.util.spec_from_file_location("land_cover", ROOT / "experiments" / "land_cover.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["land_cover"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["land_cover"]


@pytest.fixture
def data():
    folder = Path(os.environ.get("MMMAE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "terramesh" / "LULC").is_dir():
        pytest.skip(f"needs the TerraMesh scenes with labels in the folder MMMAE_DATA names, not in {folder}")
    return folder


def test_a_quick_run_measures_each_method_once_and_prints_a_table(land_cover, data, tmp_path, monkeypatch, capsys):
    methods = ["random forest", "tiny scratch", "tiny pretrained"]
    command = ["land_cover.py", "--data", str(data), "--out", str(tmp_path), "--quick", "--threads", "1"]
    command += ["--seeds", "0", "--methods"]
    threads = torch.get_num_threads()
    try:
        for some in (methods[:1], methods, methods):
            monkeypatch.setattr(sys, "argv", [*command, *some])
            land_cover.main()
    finally:
        torch.set_num_threads(threads)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(land_cover.key(result)[:2] for result in results) == sorted(
        (method, share) for method in methods for share in ("few", "all")
    )
    tiles = 16 * 64 * 64  # of the scene that is held out, every pixel of which has a label
    assert {torch.tensor(result["confusion"]).sum().item() for result in results} == {tiles}
    assert "| few | tiny pretrained |" in capsys.readouterr().out
    assert (tmp_path / "pretraining" / "tiny-0" / "encoder" / "model.safetensors").is_file()


def test_no_crop_of_a_held_out_scene_is_trained_with(land_cover, data, tmp_path):
    scenes, _ = land_cover.write_scenes(data / "terramesh" / "S2L2A", tmp_path / "scenes")
    crops = land_cover.Remembered(land_cover.PairedFolder(scenes, image_size=64, tile=64))
    experiment = land_cover.Experiment(crops, crops, None, tmp_path, land_cover.QUICK, 1)
    for held in land_cover.HELD_OUT:
        of = {share: experiment.training_crops(held, share, seed=0) for share in ("few", "all")}
        assert len(of["few"]) == 4 * land_cover.FEW
        assert len(of["all"]) == 4 * 16
        assert held not in {crops.positions[index].scene for chosen in of.values() for index in chosen}

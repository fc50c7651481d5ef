"""The experiment on real scenes holds out the scenes it names; tests/soak runs it."""

import os
from pathlib import Path

import pytest

from tests.training.experiments import loaded

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def land_cover():
    with loaded("land_cover") as module:
        yield module


@pytest.fixture
def data():
    folder = Path(os.environ.get("MMMAE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "terramesh" / "LULC").is_dir():
        pytest.skip(f"needs the TerraMesh scenes with labels in the folder MMMAE_DATA names, not in {folder}")
    return folder


def test_no_crop_of_a_held_out_scene_is_trained_with(land_cover, data, tmp_path):
    scenes, _ = land_cover.write_scenes(data / "terramesh" / "S2L2A", tmp_path / "scenes")
    crops = land_cover.Remembered(land_cover.PairedFolder(scenes, image_size=64, tile=64))
    experiment = land_cover.Experiment(crops, crops, None, tmp_path, land_cover.QUICK, 1)
    for held in land_cover.HELD_OUT:
        of = {share: experiment.training_crops(held, share, seed=0) for share in ("few", "all")}
        assert len(of["few"]) == 4 * land_cover.FEW
        assert len(of["all"]) == 4 * 16
        assert held not in {crops.positions[index].scene for chosen in of.values() for index in chosen}


def test_what_all_labels_of_the_drawn_classes_give_is_a_limit_of_few_labels(land_cover):
    found = land_cover.tasks([0], [land_cover.LIMIT, "logistic regression"], ["scene"])
    assert [(task["method"], task["share"]) for task in found] == [
        (land_cover.LIMIT, "few"),
        ("logistic regression", "few"),
        ("logistic regression", "all"),
    ]

"""Data sets of torchgeo as subjects, by number and by the queries of a sampler."""

import numpy as np
import pytest
import torch

import mmmae
from mmmae.data import DictSubjects, collate


@pytest.fixture
def scene(torchgeo, tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
    values = np.random.default_rng(0).normal(1000, 300, (12, 64, 96)).astype(np.float32)
    transform = rasterio.transform.from_origin(600000, 5300000, 10, 10)
    options = {"count": 12, "height": 64, "width": 96, "dtype": "float32", "crs": "EPSG:32632", "transform": transform}
    with rasterio.open(tmp_path / "scene.tif", "w", driver="GTiff", **options) as file:
        file.write(values)

    class Scenes(torchgeo.RasterDataset):
        filename_glob = "*.tif"
        is_image = True

    return Scenes(tmp_path), values


def test_queries_of_a_sampler_are_subjects(scene):
    from torchgeo.samplers import GridGeoSampler

    dataset, values = scene
    data = DictSubjects(dataset, list(GridGeoSampler(dataset, size=32, stride=32)), image_size=32)
    assert (len(data), data.bands) == (6, 12)
    tiles = sorted(
        float(data.normalization.invert("hsi", sample.hsi).mean()) for sample in (data[index] for index in range(6))
    )
    expected = sorted(values[:, r : r + 32, c : c + 32].mean() for r in (0, 32) for c in (0, 32, 64))
    assert tiles == pytest.approx(expected, rel=1e-4)
    batch = collate([data[0], data[1]], data.modalities)
    model = mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), aux={})
    assert torch.isfinite(model(batch.hsi, valid=batch.valid).loss)


def test_items_by_number_are_subjects(torchgeo):
    class Fields(torchgeo.NonGeoDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image": torch.full((12, 8, 8), float(index)), "label": torch.tensor(index)}

    data = DictSubjects(Fields())
    assert [float(data.normalization.invert("hsi", data[i].hsi).mean()) for i in range(3)] == [0, 1, 2]

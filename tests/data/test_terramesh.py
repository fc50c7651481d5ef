"""Measured scenes: Sentinel-2, Sentinel-1 and elevation, read and paired as a user would."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from mmmae.data import PairedFolder, collate, read_cube


@pytest.fixture(scope="module")
def data(scenes):
    aux = {"VV": f"{scenes}/S1RTC:0", "VH": f"{scenes}/S1RTC:1", "elevation": scenes / "DEM"}
    return PairedFolder(scenes / "S2L2A", aux)


def test_the_scenes_are_five_of_twelve_bands_with_three_auxiliary_images(data):
    assert len(data) == 5
    assert data.bands == 12
    assert data.modalities == {"VV": 1, "VH": 1, "elevation": 1}
    for sample in data:
        assert sample.hsi.shape == (1, 12, 224, 224)
        assert {name: tuple(image.shape) for name, image in sample.aux.items()} == dict.fromkeys(
            data.modalities, (1, 224, 224)
        )
        assert sample.valid.all()
        for image in (sample.hsi, *sample.aux.values()):
            assert torch.isfinite(image).all()


def test_the_files_are_in_the_units_of_their_sensors(scenes):
    for path in (scenes / "S2L2A").iterdir():
        optical = read_cube(path)
        assert optical.values.min() >= 0
        assert optical.values.max() < 20000  # reflectance x 10000
        radar = read_cube(scenes / "S1RTC" / path.name)
        assert radar.values.shape == (2, 224, 224)
        assert -60 < radar.values.min() < radar.values.max() < 30  # dB
        assert radar.values[0].mean() > radar.values[1].mean()  # VV is stronger than VH on land
        assert not optical.nodata.any()
        assert not radar.nodata.any()
        assert read_cube(scenes / "DEM" / path.name).values.min() > -500


def test_the_scenes_together_have_the_percentiles_of_the_map(data):
    # p2 and p98 are at (p - p50) / ((p98 - p2) / 2): two apart, and so they are measured over all pixels here.
    every = torch.stack([sample.hsi[0] for sample in data])  # [5, 12, H, W]
    flat = every.transpose(0, 1).reshape(12, -1).double()
    low, middle, high = (flat.quantile(q, dim=1) for q in (0.02, 0.5, 0.98))
    # 8192 of 50176 pixels a file stand for all: the order statistics agree to a few hundredths.
    torch.testing.assert_close(middle, torch.zeros(12).double(), rtol=0, atol=0.05)
    torch.testing.assert_close(high - low, torch.full((12,), 2.0).double(), rtol=0, atol=0.1)


def test_two_workers_give_what_the_main_process_gives(data):
    data.normalization  # noqa: B018
    make = partial(DataLoader, data, batch_size=3, collate_fn=partial(collate, modalities=data.modalities))
    for alone, worked in zip(make(), make(num_workers=2), strict=True):
        assert alone.names == worked.names
        assert torch.equal(alone.hsi, worked.hsi)
        assert all(flags.all() for flags in worked.present.values())


def test_a_scene_without_radar_is_absent_there(scenes, tmp_path):
    for path in sorted((scenes / "S1RTC").iterdir())[:3]:
        (tmp_path / path.name).symlink_to(path)
    data = PairedFolder(scenes / "S2L2A", {"VV": f"{tmp_path}:0"}, image_size=112)
    batch = collate([data[index] for index in range(5)], data.modalities)
    assert batch.hsi.shape == (5, 1, 12, 112, 112)
    assert batch.present["VV"].tolist() == [True, True, True, False, False]

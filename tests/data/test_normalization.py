"""Statistics are those of the valid pixels, normalisation can be inverted, and a damaged file is refused."""

import json
import os

import numpy as np
import pytest
import torch

from mmmae.data import Normalization, robust_percentiles
from mmmae.data.readers.cube import Cube

STATISTICS = Normalization(
    {"hsi": ((1.0, 2.0, 5.0), (-3.0, 0.0, 3.0)), "ir": ((7.0, 7.0, 7.0),)}, {"hsi": "bands 0,1", "ir": "bands 0"}
)


def cube(values, nodata=None):
    tensor = torch.as_tensor(values, dtype=torch.float32)
    return Cube(tensor, None, torch.zeros_like(tensor, dtype=torch.bool) if nodata is None else nodata)


def test_percentiles_2_50_98_map_to_a_range_of_two_around_zero():
    values = torch.tensor([1.0, 2.0, 5.0, -3.0, 0.0, 3.0]).reshape(2, 1, 3)
    torch.testing.assert_close(
        STATISTICS.apply("hsi", values), torch.tensor([[[-0.5, 0.0, 1.5]], [[-1.0, 0.0, 1.0]]]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 2, 3, 4), (5, 1, 2, 3, 4)])
def test_invert_undoes_apply(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(STATISTICS.invert("hsi", STATISTICS.apply("hsi", values)), values)


def test_a_constant_band_maps_to_zero():
    assert torch.equal(STATISTICS.apply("ir", torch.full((1, 2, 2), 7.0)), torch.zeros(1, 2, 2))
    nearly = Normalization({"ir": ((1e6, 1e6, 1e6 + 1e-3),)})
    assert nearly.apply("ir", torch.full((1, 2, 2), 1e6 + 1 / 16)).abs().max() == 1 / 16  # one step of float32


@pytest.mark.parametrize("shape", [(3, 4, 4), (4, 4), (2,)])
@pytest.mark.parametrize("method", ["apply", "invert"])
def test_values_of_another_shape_are_refused(method, shape):
    with pytest.raises(ValueError, match=r"modality 'hsi' has shape .*, expected \[..., 2, H, W\]"):
        getattr(STATISTICS, method)("hsi", torch.zeros(shape))


def test_an_unknown_modality_is_refused():
    with pytest.raises(ValueError, match="no statistics for modality 'af'; there are hsi, ir"):
        STATISTICS.apply("af", torch.zeros(1, 2, 2))


def test_the_percentiles_are_those_of_all_valid_pixels():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 30, 40)), rng.normal(5, 2, size=(2, 20, 10))
    found = np.array(robust_percentiles(iter([cube(first), cube(second)]), 2))
    pixels = np.concatenate([first.reshape(2, -1), second.reshape(2, -1)], axis=1)
    np.testing.assert_allclose(found, np.percentile(pixels, [2, 50, 98], axis=1).T, rtol=1e-6)


def test_a_pixel_with_nodata_in_any_band_does_not_count():
    values = torch.arange(8.0).reshape(2, 2, 2)
    nodata = torch.zeros(2, 2, 2, dtype=torch.bool)
    nodata[1, 1, 1] = True
    found = robust_percentiles([cube(values, nodata)], 1)
    np.testing.assert_allclose(found[0], np.percentile([0, 1, 2], [2, 50, 98]))


def test_nothing_but_nodata_is_refused():
    with pytest.raises(ValueError, match="no valid pixel"):
        robust_percentiles([cube(torch.zeros(2, 2, 2), torch.ones(2, 2, 2, dtype=torch.bool))], 1)


def test_a_subsample_of_a_large_image_is_close_and_the_same_every_time():
    # The 2nd percentile of n uniform draws has a standard error of sqrt(0.02 * 0.98 / n) = 0.0015 for n = 8192.
    y, x = torch.meshgrid(torch.linspace(0, 1, 512), torch.linspace(0, 1, 512), indexing="ij")
    large = [cube(torch.stack([x, y, torch.rand(512, 512, generator=torch.Generator().manual_seed(0))]))]
    found = robust_percentiles(large, 1)
    np.testing.assert_allclose(found, [[0.02, 0.5, 0.98]] * 3, atol=0.02)
    assert robust_percentiles(large, 1) == found


def test_memory_is_bounded_by_taking_fewer_pixels_of_many_files(monkeypatch):
    monkeypatch.setattr("mmmae.data.normalization.MAX_VALUES", 2 * 100 * 10)
    seen = []
    percentile = np.percentile
    monkeypatch.setattr(np, "percentile", lambda band, q: (seen.append(len(band)), percentile(band, q))[1])
    image = cube(torch.rand(2, 50, 50, generator=torch.Generator().manual_seed(0)))
    robust_percentiles((image for _ in range(100)), 100)
    assert seen == [1000, 1000]


def test_json_round_trip_is_exact(tmp_path):
    path = tmp_path / "statistics.json"
    statistics = Normalization({"hsi": ((0.1 + 0.2, 1 / 3, 1e30),)}, {"hsi": "bands 0"})
    statistics.save(path)
    assert Normalization.load(path) == statistics
    STATISTICS.save(path)
    assert Normalization.load(path) == STATISTICS
    assert [entry.name for entry in tmp_path.iterdir()] == ["statistics.json"]


@pytest.mark.parametrize("fails", [(os, "fsync"), (os, "replace")])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    path = tmp_path / "statistics.json"
    STATISTICS.save(path)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(*fails, fail)
    with pytest.raises(OSError, match="disk full"):
        Normalization({"hsi": ((0.0, 1.0, 2.0),)}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["statistics.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "null",
        '{"percentiles": {}}',
        '{"format": "mmmae-normalization-1"}',
        '{"format": "mmmae-normalization-1", "percentiles": {"hsi": []}}',
        '{"format": "mmmae-normalization-1", "percentiles": {"hsi": [[1, 2]]}}',
        '{"format": "mmmae-normalization-1", "percentiles": {"hsi": [[3, 2, 1]]}}',
        '{"format": "mmmae-normalization-1", "percentiles": {"hsi": [[1, 2, NaN]]}}',
        '{"format": "mmmae-normalization-1", "percentiles": {"hsi": [["a", "b", "c"]]}}',
        '{"format": "mmmae-normalization-1", "percentiles": {"hsi": [[1, 2, 3]]}, "selection": 4}',
        '{"format": "mmmae-normalization-1", "percentiles": 4}',
        '{"format": "mmmae-normalization-1", "percentiles": {"hsi": [[1, 2, 3]]',
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "statistics.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"statistics\.json: is not a file of normalisation statistics"):
        Normalization.load(path)


def test_a_folder_is_no_file_of_statistics(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file of normalisation statistics"):
        Normalization.load(tmp_path)


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Normalization.load(tmp_path / "none.json")


@pytest.mark.parametrize("value", ["nan", "-9999.0", "0.0001"])
def test_how_files_were_read_is_stored(tmp_path, value):
    statistics = Normalization({"hsi": ((1.0, 2.0, 5.0),)}, reading={"hsi": {"nodata": value, "scale": "0.5"}})
    statistics.save(tmp_path / "statistics.json")
    assert Normalization.load(tmp_path / "statistics.json") == statistics


@pytest.mark.parametrize("reading", [[], {"hsi": 3}, {"hsi": {"scale": "x"}}, {"hsi": {"nodata": [1]}}], ids=str)
def test_a_way_of_reading_that_is_none_is_refused(tmp_path, reading):
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({**STATISTICS.to_json(), "reading": reading}))
    with pytest.raises(ValueError, match="is not a file of normalisation statistics"):
        Normalization.load(path)

"""Rasters of features lie on the grid of the tokens, and hold what the encoder says of each tile."""

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine

import mmmae
from mmmae.cli import main
from mmmae.data import Normalization, PairedFolder
from mmmae.data.readers.windows import Window
from mmmae.data.tiles import Position, untile
from mmmae.training.inference.feature_rasters import encode_rasters

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), aux={})
PLACE = Affine(30, 0, 500_000.3, 0, -30, 5_100_000)
IDENTITY = Normalization({"hsi": ((-1.0, 0.0, 1.0),) * 12})


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return mmmae.HSIEncoder(CONFIG).eval()


@pytest.fixture
def scene(tmp_path):
    """A folder with one cube of 75 x 50 pixels, of which 16 x 16 have no data."""
    (tmp_path / "hsi").mkdir()
    values = np.random.default_rng(0).normal(size=(12, 75, 50)).astype(np.float32)
    values[:, 24:40, 16:32] = -9
    size = {"count": 12, "height": 75, "width": 50, "dtype": "float32", "nodata": -9}
    with rasterio.open(
        tmp_path / "hsi" / "a.tif", "w", driver="GTiff", crs="EPSG:32632", transform=PLACE, **size
    ) as file:
        file.write(values)
    return tmp_path


def tiles_of(folder, **options):
    return PairedFolder(folder / "hsi", edges="cut", normalization=IDENTITY, **{"tile": 32, "overlap": 8, **options})


def test_a_raster_holds_the_features_of_the_tiles_where_the_tokens_lie(encoder, scene):
    subjects = tiles_of(scene)
    (path,) = encode_rasters(encoder, subjects, scene / "out", window=32, batch=4)
    with rasterio.open(path) as file:
        found = file.read()
        assert (file.transform, file.crs.to_epsg()) == (Affine(240, 0, 500_000.3, 0, -240, 5_100_000), 32632)
        assert (file.descriptions[0], file.descriptions[63], np.isnan(file.nodata)) == ("feature 0", "feature 63", True)
    assert found.shape == (64, 10, 7)  # 75 / 8 and 50 / 8, rounded up
    features, places = [], []
    for index, (name, window) in enumerate(subjects.positions):
        hsi = subjects[index].hsi[0].numpy()
        square = np.pad(hsi, ((0, 0), (0, 32 - window.height), (0, 32 - window.width)), mode="reflect")
        with torch.no_grad():
            tokens = encoder(torch.from_numpy(square)[None, None])
        grid = tokens.unflatten(1, CONFIG.grid)[0].mean(0).permute(2, 0, 1)
        places.append(
            Position(name, Window(window.row // 8, window.column // 8, -(-window.height // 8), -(-window.width // 8)))
        )
        features.append(grid[:, : places[-1].window.height, : places[-1].window.width])
    expected = untile(features, places, weighted=True)["a"].numpy()
    missing = np.zeros((10, 7), bool)
    missing[3:5, 2:4] = True
    missing[:, 6] = True  # of whose 8 columns the cube has 2; of the last row it has 3
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(missing, found.shape))
    np.testing.assert_allclose(found[:, ~missing], expected[:, ~missing], atol=1e-5)


def test_the_command_writes_rasters_with_tiles_that_end_with_tokens(encoder, scene, capsys):
    encoder.save_pretrained(scene / "encoder")
    tiles_of(scene).normalization.save(scene / "encoder" / "normalization.json")
    command = ["encode", "--encoder", str(scene / "encoder"), "--hsi", str(scene / "hsi"), "--out", str(scene / "out")]
    assert main([*command, "--raster"]) == 0
    assert "tile=32, overlap=8" in capsys.readouterr().out
    (path,) = encode_rasters(encoder, tiles_of(scene), scene / "direct", window=32)
    with rasterio.open(scene / "out" / "a.tif") as one, rasterio.open(path) as other:
        np.testing.assert_array_equal(one.read(), other.read())
    assert main([*command, "--raster", "--tile", "64"]) == 0
    with rasterio.open(scene / "out" / "a.tif") as file:
        assert (file.res, file.shape) == ((480, 480), (5, 4))  # tokens of 16 pixels
    for options, message in (
        (["--pool", "spatial"], "--pool is for one file of features"),
        (["--overlap", "3"], "a tile begins at row 0, column 29, expected multiples of 8 and 8"),
        (["--tile", "30"], "tiles of 30 pixels have 4 x 4 tokens"),
    ):
        assert main([*command, "--raster", *options]) == 2
        assert message in capsys.readouterr().err


def test_subjects_that_are_no_tiles_are_refused(encoder, scene):
    whole = PairedFolder(scene / "hsi", normalization=IDENTITY)
    with pytest.raises(ValueError, match="the subjects are no tiles of scenes"):
        encode_rasters(encoder, whole, scene / "out", window=32)


def test_a_raster_does_not_replace_a_cube(encoder, scene):
    before = (scene / "hsi" / "a.tif").read_bytes()
    with pytest.raises(ValueError, match=r"a.tif would replace .*a.tif, which is read; name another --out"):
        encode_rasters(encoder, tiles_of(scene), scene / "hsi", window=32)
    assert (scene / "hsi" / "a.tif").read_bytes() == before

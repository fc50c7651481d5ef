"""Maps of scenes are what the model says of their windows, lie where the cubes do, and need the memory of a tile."""

import csv
import json
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import torch
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine

import mmmae
from mmmae.cli import main
from mmmae.data import Normalization, PairedFolder
from mmmae.data.readers.windows import Window
from mmmae.data.tiles import untile
from mmmae.data.windows import reflect_windows
from mmmae.model.finetuned import build, read_finetuned, save_finetuned
from mmmae.model.heads import SegmentationModel
from mmmae.phantom import Phantom
from mmmae.training.finetuning.finetune import find_training_size, finetune
from mmmae.training.finetuning.labels import read_mask_labels
from mmmae.training.finetuning.settings import FinetuneSettings
from mmmae.training.inference.class_maps import Classes, draw_classes
from mmmae.training.inference.predict import predict_scenes, predict_subjects
from mmmae.training.inference.stitching import Tile, stitch

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), aux={})
CLASSES = ["bare soil", "wheat, $winter$", "w<ter"]
PLACE = Affine(30, 0, 500_000.3, 0, -30, 5_100_000)
IDENTITY = Normalization({"hsi": ((-1.0, 0.0, 1.0),) * 12})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build("segmentation", mmmae.HSIEncoder(CONFIG), 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def write_scene(path, values, **options):
    count, height, width = values.shape
    options = {"crs": "EPSG:32632", "transform": PLACE, "nodata": -9, **options}
    size = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", **size, **options) as file:
        file.write(values)


@pytest.fixture
def scenes(tmp_path):
    """Cubes of 75 x 50 pixels and of 20 x 50, less than a tile; the first has no data in a corner."""
    (tmp_path / "hsi").mkdir()
    rng = np.random.default_rng(0)
    large = rng.normal(size=(12, 75, 50)).astype(np.float32)
    large[3, :5, :7] = -9
    write_scene(tmp_path / "hsi" / "large.tif", large)
    write_scene(tmp_path / "hsi" / "small.tif", rng.normal(size=(12, 20, 50)).astype(np.float32))
    return tmp_path


def tiles_of(folder, **options):
    return PairedFolder(folder / "hsi", tile=32, edges="clip", normalization=IDENTITY, **options)


def read(path):
    with rasterio.open(path) as file:
        return file.read()


def test_maps_are_the_weighted_means_of_what_the_model_says_of_windows(model, scenes):
    subjects = tiles_of(scenes, overlap=8)
    maps = predict_scenes(model, CLASSES, subjects, scenes / "out", window=32, batch=4, probabilities=True)
    assert [path.name for path in maps] == ["large.tif", "small.tif"]

    def square(hsi):  # of the small scene, 20 x 32: continued downwards by reflection
        return torch.cat([hsi, hsi.flip(-2)[..., 1 : 33 - hsi.shape[-2], :]], dim=-2)

    with torch.no_grad():
        logits = [model(square(subjects[index].hsi)[None])[0] for index in range(len(subjects))]
    windows = [position.window for position in subjects.positions]
    logits = [values[:, : window.height] for values, window in zip(logits, windows, strict=True)]
    for scene, expected in untile(logits, subjects.positions, weighted=True).items():
        found, shares = read(scenes / "out" / f"{scene}.tif")[0], read(scenes / "out" / f"{scene}_probabilities.tif")
        valid = ~np.isnan(shares[0])
        assert (found == 255).sum() == (35 if scene == "large" else 0)
        np.testing.assert_array_equal(found == 255, ~valid)
        assert valid[5:].all()
        np.testing.assert_allclose(shares[:, valid], expected.softmax(0).numpy()[:, valid], atol=1e-5)
        np.testing.assert_array_equal(found[valid], shares.argmax(0)[valid])
        assert len(np.unique(found[valid])) > 1
    alone = logits[0].argmax(0).numpy()[8:24, 8:18]  # the next tiles begin at row 24 and at column 18
    np.testing.assert_array_equal(read(scenes / "out" / "large.tif")[0, 8:24, 8:18], alone)


def test_a_map_has_place_colours_and_names(model, scenes):
    (path, _) = predict_scenes(model, CLASSES, tiles_of(scenes), scenes / "out", window=32, values=[1, 2, 17])
    figure = draw_classes(path, Classes.of(CLASSES, [1, 2, 17]))
    present = {*np.unique(read(path))} - {255}
    shown = [text.get_text() for text in figure.legends[0].texts]
    assert shown == [CLASSES[number].replace("$", r"\$") for number, value in enumerate((1, 2, 17)) if value in present]
    (image,) = figure.axes[0].images
    np.testing.assert_array_equal((image.get_array() == 1).all(-1), read(path)[0] == 255)  # no data is white
    assert (scenes / "out" / "large.png").exists()
    with rasterio.open(path) as file:
        assert (file.transform, file.crs.to_epsg(), file.shape) == (PLACE, 32632, (75, 50))
        assert (file.dtypes, file.nodata, file.block_shapes) == (("uint8",), 255, [(128, 128)])
        assert {*np.unique(file.read())} <= {1, 2, 17, 255}
        assert json.loads(file.tags()["classes"]) == {"1": CLASSES[0], "2": CLASSES[1], "17": CLASSES[2]}
        colours = file.colormap(1)
    assert len({colours[value] for value in (1, 2, 17)}) == 3
    assert colours[255] == (0, 0, 0, 0)
    names = [name.text for name in ElementTree.parse(f"{path}.aux.xml").iter("Category")]
    assert (len(names), names[1], names[2], names[17], names[3]) == (18, *CLASSES, None)


def test_many_classes_and_ground_control_points_are_kept(model, tmp_path):
    (tmp_path / "hsi").mkdir()
    points = [GroundControlPoint(row, column, 7 + column, 50 - row) for row, column in ((0, 0), (0, 32), (32, 0))]
    values = np.random.default_rng(0).normal(size=(12, 32, 32)).astype(np.float32)
    write_scene(tmp_path / "hsi" / "a.tif", values, transform=None, gcps=points, crs="EPSG:4326")
    (path,) = predict_scenes(model, CLASSES, tiles_of(tmp_path), tmp_path, window=32, values=[0, 255, 300])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path) as file:
            assert (file.dtypes, file.nodata, len(file.gcps[0])) == (("uint16",), 65535, 3)
            assert (file.gcps[0][1].col, file.gcps[0][1].x) == (32, 39)
            assert file.colormap(1)[300][3] == 255


def test_a_cube_without_a_place_is_no_reason_for_a_warning(model, tmp_path):
    (tmp_path / "hsi").mkdir()
    np.save(tmp_path / "hsi" / "a.npy", np.random.default_rng(0).normal(size=(12, 32, 32)).astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (path,) = predict_scenes(model, CLASSES, tiles_of(tmp_path), tmp_path, window=32)
    assert path.with_suffix(".png").is_file()


def test_subjects_that_are_not_tiles_are_scenes_which_are_resized_for_the_model(model, scenes, capsys):
    subjects = PairedFolder(scenes / "hsi", image_size=32, normalization=IDENTITY)
    predict_scenes(model, CLASSES, subjects, scenes / "out", batch=1, probabilities=True)
    for index, scene in enumerate(("large", "small")):
        with torch.no_grad():
            logits = model(subjects[index].hsi[None])
        size = subjects.cube_size(index)
        expected = torch.nn.functional.interpolate(logits, size, mode="bilinear")[0].softmax(0).numpy()
        shares = read(scenes / "out" / f"{scene}_probabilities.tif")
        assert shares.shape == expected.shape
        valid = ~np.isnan(shares[0])
        assert valid.mean() > 0.98
        np.testing.assert_allclose(shares[:, valid], expected[:, valid], atol=1e-5)
        with rasterio.open(scenes / "out" / f"{scene}.tif") as file:
            np.testing.assert_array_equal(file.read(1)[valid], shares.argmax(0)[valid])
            assert (file.shape, file.transform) == (size, PLACE)
    save_finetuned(scenes / "model", model, CLASSES, whole=True)
    subjects.normalization.save(scenes / "model" / "normalization.json")
    command = ["predict", "--model", str(scenes / "model"), "--hsi", str(scenes / "hsi"), "--out", str(scenes / "maps")]
    assert main(command) == 0
    assert "each cube is predicted whole, resized to 32 x 32 pixels as in training" in capsys.readouterr().out
    for name in ("large.tif", "small.tif"):
        np.testing.assert_array_equal(read(scenes / "maps" / name), read(scenes / "out" / name))
    assert main([*command, "--tile", "32"]) == 0
    assert "tile=32, overlap=8" in capsys.readouterr().out


def test_a_model_knows_what_cubes_it_was_trained_on(scenes):
    (scenes / "labels").mkdir()
    for name, size in (("large", (75, 50)), ("small", (20, 50))):
        np.save(scenes / "labels" / f"{name}.npy", np.arange(size[0] * size[1]).reshape(size) % 2)
    subjects = PairedFolder(scenes / "hsi", image_size=32, normalization=IDENTITY)
    labels = read_mask_labels(scenes / "labels", subjects)
    settings = FinetuneSettings(epochs=1, device="cpu")
    encoder = mmmae.HSIEncoder(CONFIG.replace(depth=1))
    finetune(encoder, subjects, labels, scenes / "run", settings, validation=["small"], maps=0)
    config = read_finetuned(scenes / "run" / "model")
    assert (config.window, config.whole) == (None, True)

    class Sizes(Phantom):
        def cube_size(self, index):
            return (100, 100) if index < 2 else (200, 200)

    assert find_training_size(Sizes(4, 32), [0, 1]) == (100, False)
    assert find_training_size(Sizes(4, 32), [1, 2]) == (None, True)
    assert find_training_size(Phantom(4, 32), [0, 1]) == (None, False)
    assert find_training_size(tiles_of(scenes), [0, 1]) == (32, False)


def test_numbers_of_classes_too_large_for_a_map_are_counted_from_1(model, scenes, capsys):
    save_finetuned(scenes / "model", model, CLASSES, numbers=[7, 100_000, 200_000], window=32)
    tiles_of(scenes).normalization.save(scenes / "model" / "normalization.json")
    command = ["predict", "--hsi", str(scenes / "hsi"), "--out", str(scenes / "out")]
    assert main([*command, "--model", str(scenes)]) == 2
    assert f"expected the folder of the model itself, {scenes / 'model'}" in capsys.readouterr().err
    assert main([*command, "--model", str(scenes / "model")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "class numbers go up to 200000, too large for a map; its classes are numbered from 1" in printed
    with rasterio.open(scenes / "out" / "large.tif") as file:
        assert {*np.unique(file.read())} <= {1, 2, 3, 255}
        assert json.loads(file.tags()["classes"]) == dict(zip("123", CLASSES, strict=True))


class Brightest(SegmentationModel):
    """Takes each pixel for the class of its brightest band."""

    def forward(self, hsi):
        return hsi[:, 0, :3]


def test_a_long_strip_is_written_from_the_rows_of_a_tile(tmp_path, monkeypatch):
    (tmp_path / "hsi").mkdir()
    values = np.random.default_rng(0).integers(0, 255, (3, 20_000, 200), dtype=np.uint8)
    write_scene(tmp_path / "hsi" / "strip.tif", values, nodata=None, tiled=True, blockxsize=256, blockysize=256)
    config = CONFIG.replace(bands=3, image_size=200)
    identity = Normalization({"hsi": ((-1.0, 0.0, 1.0),) * 3})
    subjects = PairedFolder(tmp_path / "hsi", tile=200, overlap=50, edges="clip", normalization=identity)
    held = []

    def counted(tiles, channels, width):
        for rows in stitch(tiles, channels, width):
            held.append(rows.values.untyped_storage().nbytes() // (4 * channels * width))
            yield rows

    monkeypatch.setattr("mmmae.training.inference.predict.stitch", counted)
    (path,) = predict_scenes(Brightest(mmmae.HSIEncoder(config), 3), CLASSES, subjects, tmp_path, window=200)
    with rasterio.open(path) as file:
        assert (file.shape, file.transform, file.crs.to_epsg()) == ((20_000, 200), PLACE, 32632)
        found = file.read(1)
    ordered = np.sort(values, axis=0)
    clear = ordered[2] > ordered[1]  # rounding may decide between bands that are equal
    np.testing.assert_array_equal(found[clear], values.argmax(0)[clear])
    assert len(held) == 133
    assert max(held) <= 200


def test_a_pixel_has_the_class_of_the_window_around_it(scenes, monkeypatch):
    cut = []

    def recorded(image, rows, columns, window):
        cut.append(len(rows))
        return reflect_windows(image, rows, columns, window)

    monkeypatch.setattr("mmmae.training.inference.predict.reflect_windows", recorded)
    torch.manual_seed(0)
    model = build("pixels", mmmae.HSIEncoder(CONFIG.replace(image_size=8, patch=(3, 4, 4))), 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_finetuned(scenes / "model", model, CLASSES, window=5)
    tiles_of(scenes).normalization.save(scenes / "model" / "normalization.json")
    options = ["--model", str(scenes / "model"), "--hsi", str(scenes / "hsi"), "--out", str(scenes / "out")]
    assert main(["predict", *options, "--tile", "28", "--probabilities"]) == 0
    assert main(["predict", *options, "--overlap", "2"]) == 2
    whole = PairedFolder(scenes / "hsi", tile=100, edges="clip", normalization=IDENTITY)
    for subject in map(whole.__getitem__, range(2)):
        name = subject.name.partition("@")[0]
        padded = np.pad(subject.hsi[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        shares = read(scenes / "out" / f"{name}_probabilities.tif")
        np.testing.assert_array_equal(np.isnan(shares[0]), ~subject.valid.numpy())
        height, width = subject.valid.shape
        for row, column in ((0, 8), (19, 0), (height - 1, width - 1), (17, 18), (10, 19), (15, 29), (height - 20, 30)):
            window = torch.from_numpy(padded[None, None, :, row : row + 5, column : column + 5])
            with torch.no_grad():
                expected = model(window).softmax(1)[0]
            np.testing.assert_allclose(shares[:, row, column], expected, atol=1e-5)
    assert sum(cut) == sum(int(subject.valid.sum()) for subject in map(whole.__getitem__, range(len(whole))))


def test_tiles_that_come_too_late_are_refused():
    tiles = [Tile("a", Window(row, 0, 2, 2), torch.zeros(1, 2, 2), torch.ones(2, 2).bool()) for row in (0, 2, 1)]
    with pytest.raises(ValueError, match="a tile of scene 'a' begins in row 1, but rows above 2 are done"):
        list(stitch(tiles, 1, 2))


def test_a_broken_tile_leaves_the_old_map(model, scenes):
    predict_scenes(model, CLASSES, tiles_of(scenes), scenes / "out", window=32)
    before = {path.name: path.read_bytes() for path in (scenes / "out").iterdir()}

    class Broken(PairedFolder):
        def __getitem__(self, index):
            if index == 3:
                raise ValueError("broken")
            return super().__getitem__(index)

    subjects = Broken(scenes / "hsi", tile=32, edges="clip", normalization=IDENTITY)
    with pytest.raises(ValueError, match="broken"):
        predict_scenes(model, CLASSES, subjects, scenes / "out", window=32, batch=1, probabilities=True)
    assert {path.name: path.read_bytes() for path in (scenes / "out").iterdir()} == before


def test_a_map_does_not_replace_a_cube(model, scenes):
    (scenes / "same").symlink_to(scenes / "hsi")
    write_scene(scenes / "hsi" / "small_probabilities.tif", np.ones((12, 40, 40), np.float32))
    before = {path.name: path.read_bytes() for path in (scenes / "hsi").iterdir()}
    message = r"large.tif would replace .*hsi/large.tif, which is read; name another --out"
    with pytest.raises(ValueError, match=message):
        predict_scenes(model, CLASSES, tiles_of(scenes), scenes / "same", window=32)
    one = PairedFolder(scenes / "hsi" / "small.tif", tile=32, edges="clip", normalization=IDENTITY)
    (scenes / "out").mkdir()
    (scenes / "out" / "small_probabilities.tif").hardlink_to(scenes / "hsi" / "small.tif")
    with pytest.raises(ValueError, match=r"small_probabilities.tif would replace .*small.tif"):
        predict_scenes(model, CLASSES, one, scenes / "out", window=32, probabilities=True)
    assert {path.name: path.read_bytes() for path in (scenes / "hsi").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [1, 2]}, "values is .1, 2., expected 3 different numbers in 0..65534"),
        ({"values": [1, 2, 2]}, "expected 3 different numbers"),
        ({"values": [1, 2, 65535]}, "expected 3 different numbers"),
        ({"batch": 0}, "batch is 0"),
        ({"device": "quantum"}, "device is 'quantum'"),
        ({"precision": "8"}, "precision is '8'"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(model, scenes, arguments, message):
    with pytest.raises(ValueError, match=message):
        predict_scenes(model, CLASSES, tiles_of(scenes), scenes / "out", **arguments)
    assert not (scenes / "out").exists()


@pytest.fixture
def saved(model, scenes):
    save_finetuned(scenes / "model", model, CLASSES, numbers=[1, 2, 17], window=24)
    tiles_of(scenes).normalization.save(scenes / "model" / "normalization.json")
    return scenes


def test_the_command_uses_window_values_and_statistics_of_the_model(model, saved, capsys):
    command = ["predict", "--model", str(saved / "model"), "--hsi", str(saved / "hsi"), "--out", str(saved / "maps")]
    assert main([*command, "--batch", "3", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "tile=24, overlap=6" in printed
    assert "normalization.json" in printed
    subjects = PairedFolder(saved / "hsi", tile=24, overlap=6, edges="clip", normalization=IDENTITY)
    predict_scenes(model, CLASSES, subjects, saved / "out", window=24, values=[1, 2, 17], batch=3)
    names = ["large.tif", "small.tif"]
    for name in names:
        np.testing.assert_array_equal(read(saved / "maps" / name), read(saved / "out" / name))
    assert sorted(path.name for path in (saved / "maps").glob("*.tif")) == names
    assert main([*command, "--tile", "32", "--overlap", "0", "--probabilities"]) == 0
    assert "tile=32, overlap=0" in capsys.readouterr().out
    assert len(list((saved / "maps").glob("*_probabilities.tif"))) == 2


def test_a_model_of_subjects_gives_a_table(scenes, capsys):
    torch.manual_seed(0)
    model = build("classification", mmmae.HSIEncoder(CONFIG), 3).eval()
    torch.nn.init.normal_(model.head.weight)
    save_finetuned(scenes / "model", model, ["=a", "b", "c"])
    command = ["predict", "--model", str(scenes / "model"), "--hsi", str(scenes / "hsi"), "--out", str(scenes / "out")]
    assert main(command) == 0
    assert "wrote" in capsys.readouterr().out
    with (scenes / "out" / "classes.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "class", "probability of '=a", "probability of b", "probability of c"]
    subjects = PairedFolder(scenes / "hsi", image_size=32)
    with torch.no_grad():
        shares = torch.cat([model(subjects[index].hsi[None]) for index in range(2)]).softmax(1)
    assert [row[0] for row in rows] == ["large", "small"]
    torch.testing.assert_close(
        torch.tensor([[float(cell) for cell in row[2:]] for row in rows]), shares, atol=1e-5, rtol=0
    )
    assert [row[1] for row in rows] == [["'=a", "b", "c"][number] for number in shares.argmax(1)]
    assert main([*command, "--probabilities"]) == 2
    assert "classes.csv has the probabilities of subjects anyway" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_an_error_that_names_the_subject(scenes):
    model = build("classification", mmmae.HSIEncoder(CONFIG), 3)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ValueError, match="subject 'large': its logits are not finite"):
        predict_subjects(model, CLASSES, PairedFolder(scenes / "hsi", image_size=32), scenes / "classes.csv")
    assert not (scenes / "classes.csv").exists()

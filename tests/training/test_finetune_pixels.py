"""One scene is fine-tuned with pixels held out: by tiles, and by windows around each pixel."""

import contextlib
import json
import re
import weakref

import numpy as np
import pytest
import torch

import mmmae
from mmmae.cli import main
from mmmae.data import PairedFolder
from mmmae.data.windows import reflect_windows
from mmmae.model.finetuned import load_finetuned, read_finetuned
from mmmae.model.pixels import PixelClassifier
from mmmae.training.finetuning.finetune import finetune
from mmmae.training.finetuning.labels import UNLABELLED, read_mask_labels
from mmmae.training.finetuning.maps import write_maps
from mmmae.training.finetuning.pixels import LabelledPixels, predict_pixels
from mmmae.training.finetuning.settings import FinetuneSettings
from mmmae.training.finetuning.splits import divide

SCRATCH = ["finetune", "--scratch", "--preset", "tiny", "--epochs", "1", "--ignore", "0"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with the scene `hsi/field.npz` of 24 x 20 pixels in blocks of a class each, and labels `gt.npy`."""
    folder, rng = tmp_path_factory.mktemp("scene"), np.random.default_rng(0)
    labels = rng.permutation(np.arange(30) % 4).reshape(6, 5).repeat(4, 0).repeat(4, 1)
    cube = rng.normal(size=(4, 12))[labels].transpose(2, 0, 1) * 3 + rng.normal(size=(12, 24, 20)) / 3
    cube[:, :2] = np.nan
    (folder / "hsi").mkdir()
    np.savez(folder / "hsi" / "field.npz", cube=cube.astype(np.float32), nodata=np.nan)
    np.save(folder / "gt.npy", labels.astype(np.uint8))
    return folder


def test_windows_are_those_around_the_labelled_and_valid_pixels(scene):
    subjects = PairedFolder(scene / "hsi")
    labels = read_mask_labels(scene / "gt.npy", subjects, ignore=0)
    gt, sample = np.load(scene / "gt.npy"), subjects[0]
    data = LabelledPixels({0: sample}, labels, 5, FinetuneSettings(), augmented=False)
    assert len(data.chosen) == (gt[2:] > 0).sum()  # two rows are nodata
    for visit in (0, len(data.chosen) // 2, len(data.chosen) - 1):
        _, row, column, number = data.chosen[visit].tolist()
        assert gt[row, column] == number + 1
        item = data[visit]
        assert int(item.target) == number
        assert torch.equal(item.hsi[..., 2, 2], sample.hsi[..., row, column])
        assert torch.equal(item.hsi, reflect_windows(sample.hsi, torch.tensor([row]), torch.tensor([column]), 5)[0])
    augmented = LabelledPixels({0: sample}, labels, 5, FinetuneSettings(), augmented=True)
    turned = [augmented[100 + visit * len(data.chosen)].hsi for visit in range(8)]
    assert all(torch.equal(window[..., 2, 2], data[100].hsi[..., 2, 2]) for window in turned)
    assert len({window.numpy().tobytes() for window in turned}) > 3


def test_predictions_of_a_scene_are_those_of_its_windows():
    torch.manual_seed(0)
    encoder = mmmae.HSIEncoder(mmmae.MMMAEConfig.preset("tiny", image_size=3, patch=(3, 3, 3), aux={}))
    model = PixelClassifier(encoder, 4).eval()
    hsi = torch.randn(1, 12, 5, 7)
    logits = predict_pixels(model, hsi, 3, batch=8)
    assert logits.shape == (4, 5, 7)
    for row, column in ((0, 0), (2, 6), (4, 3)):
        window = reflect_windows(hsi, torch.tensor([row]), torch.tensor([column]), 3)
        with torch.no_grad():
            torch.testing.assert_close(logits[:, row, column], model(window)[0])


def test_one_scene_is_classified_pixel_by_pixel_from_the_command_line(scene, tmp_path, capsys):
    words = ["--hsi", str(scene / "hsi"), "--labels", str(scene / "gt.npy"), "--task", "pixels", "--window", "3"]
    assert main([*SCRATCH, *words, "--split", "blocks:8", "--batch", "32", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "of 9 blocks of 8 x 8 pixels are held out: " in printed
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"held out: {report['pixels']['test']:,} pixels; kept epoch" in printed
    assert sum(row["training"] for row in report["classes"].values()) == report["pixels"]["training"]
    assert sum(map(sum, report["confusion"])) == report["pixels"]["test"] > 0
    assert {"accuracy", "average_accuracy", "kappa", "f1_macro", "miou", "split"} < set(report)
    config = read_finetuned(tmp_path / "run" / "model")
    assert (config.task, config.window, config.numbers) == ("pixels", 3, [1, 2, 3])
    assert isinstance(load_finetuned(tmp_path / "run" / "model")[0], PixelClassifier)
    assert (tmp_path / "run" / "maps" / "field.png").exists()


def test_a_window_that_the_patch_does_not_divide_is_enlarged(scene, tmp_path):
    words = ["--hsi", str(scene / "hsi"), "--labels", str(scene / "gt.npy"), "--task", "pixels", "--window", "5"]
    words += ["--set", "patch=3,4,4", "--split", "pixels:0.1", "--batch", "512", "--maps", "0"]
    assert main([*SCRATCH, *words, "--out", str(tmp_path / "run")]) == 0
    config = read_finetuned(tmp_path / "run" / "model")
    assert (config.window, config.encoder["image_size"]) == (5, 8)


def test_pixels_of_one_scene_are_learnt_from_a_tenth_of_them(scene, tmp_path):
    subjects = PairedFolder(scene / "hsi")
    labels = read_mask_labels(scene / "gt.npy", subjects, ignore=0)
    torch.manual_seed(0)
    encoder = mmmae.HSIEncoder(mmmae.MMMAEConfig.preset("tiny", image_size=3, patch=(3, 3, 3), aux={}))
    settings = FinetuneSettings(epochs=8, batch=4, learning_rate=3e-3, layer_decay=1.0, keep="last")
    _, report = finetune(encoder, subjects, labels, tmp_path, settings, split="pixels:0.1", window=3, maps=0)
    assert report["accuracy"] > 0.9  # noise of 1/3 about spectra that are 3 apart in each of twelve bands


@pytest.mark.parametrize("image_size", [32, 8])
def test_each_pixel_of_a_scene_that_is_resized_is_scored_once(scene, tmp_path, capsys, image_size):
    (tmp_path / "hsi").mkdir()
    rng, gt = np.random.default_rng(0), np.load(scene / "gt.npy")[4:, :]
    gt = np.where(gt == 0, 1, gt)
    gt[0, 0] = 9  # not under a centre of the pixels of a smaller image
    shapes = {"field": gt, "other": gt[:16, :16]}
    for name, labels in shapes.items():
        np.save(tmp_path / "hsi" / f"{name}.npy", rng.normal(size=(12, *labels.shape)).astype(np.float32))
        (tmp_path / "labels").mkdir(exist_ok=True)
        np.save(tmp_path / "labels" / f"{name}.npy", labels.repeat(2, 0).repeat(2, 1))  # on a grid twice as fine
    subjects = PairedFolder(tmp_path / "hsi", image_size=image_size)
    labels = read_mask_labels(tmp_path / "labels", subjects)
    torch.manual_seed(0)
    encoder = mmmae.HSIEncoder(mmmae.MMMAEConfig.preset("tiny", image_size=image_size, patch=(3, 4, 4), aux={}))
    settings = FinetuneSettings(epochs=1, batch=2, class_weights="balanced")
    _, report = finetune(encoder, subjects, labels, tmp_path / "run", settings, split="pixels:0.3", maps=0)
    assert sum(map(sum, report["confusion"])) == report["pixels"]["test"]
    assert sum(report["pixels"].values()) == 20 * 20 + 16 * 16
    told = re.search(r"resized to 8 x 8, (\d+) of (\d+) training pixels are left", capsys.readouterr().out)
    if image_size == 32:
        assert told is None
        assert report["not_trained"] == []
    else:
        assert told is not None
        assert int(told[1]) < int(told[2]) == report["pixels"]["training"]
        assert report["not_trained"] == ["9"]


def test_a_map_of_one_scene_shows_roles_and_the_errors_of_the_test_pixels(scene, tmp_path, monkeypatch):
    subjects = PairedFolder(scene / "hsi", image_size=8, tile=8, overlap=4)
    labels = read_mask_labels(scene / "gt.npy", subjects, ignore=0)
    parts = divide(subjects, labels, "blocks:8")
    drawn = []
    monkeypatch.setattr("mmmae.training.finetuning.maps.draw_map", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr("mmmae.training.finetuning.maps.save_figure", lambda figure, path: None)
    encoder = mmmae.HSIEncoder(mmmae.MMMAEConfig.preset("tiny", image_size=8, patch=(3, 4, 4), aux={}))
    model = mmmae.SegmentationModel(encoder, 3).eval()
    write_maps(model, subjects, labels, list(parts.held_out.counts), tmp_path, count=1, roles=parts.roles)
    _, picture, target, predicted, valid, _, _, roles = drawn[0]
    gt = torch.from_numpy(np.load(scene / "gt.npy")).long()
    gt[:2] = 0
    assert picture.shape[1:] == target.shape == predicted.shape == valid.shape == (24, 20)
    assert torch.equal(torch.where(target == UNLABELLED, 0, target + 1), gt)
    assert torch.equal(roles, parts.roles["field"].long())


@pytest.mark.parametrize("tiled", [True, False])
def test_maps_hold_one_cube_at_a_time_and_show_scenes_at_their_size(scene, tmp_path, monkeypatch, tiled):
    subjects = PairedFolder(scene / "hsi", image_size=8, tile=8 if tiled else None)
    labels = read_mask_labels(scene / "gt.npy", subjects, ignore=0)
    cubes, drawn, read, most = [], [], PairedFolder.__getitem__, 0

    def counted(self, index):
        nonlocal most
        sample = read(self, index)
        cubes.append(weakref.ref(sample.hsi.untyped_storage()))
        most = max(most, sum(cube() is not None for cube in cubes))
        return sample

    monkeypatch.setattr(PairedFolder, "__getitem__", counted)
    monkeypatch.setattr("mmmae.training.finetuning.maps.draw_map", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr("mmmae.training.finetuning.maps.save_figure", lambda figure, path: None)
    encoder = mmmae.HSIEncoder(mmmae.MMMAEConfig.preset("tiny", image_size=8, patch=(3, 4, 4), aux={}))
    write_maps(mmmae.SegmentationModel(encoder, 3).eval(), subjects, labels, list(labels.counts), tmp_path, count=1)
    assert len(cubes) == (9 if tiled else 1)
    assert most <= 2  # the next one is read before the last one is let go
    picture, target, predicted, valid = drawn[0][1:5]
    assert picture.shape == (3, 24, 20)
    assert target.shape == predicted.shape == valid.shape == (24, 20)


def test_windows_of_a_map_are_predicted_in_the_precision_of_training_and_counted(scene, tmp_path, monkeypatch):
    subjects = PairedFolder(scene / "hsi")
    labels = read_mask_labels(scene / "gt.npy", subjects, ignore=0)
    found, steps = [], []

    class Model(torch.nn.Linear):
        def forward(self, hsi):
            found.append(super().forward(hsi.mean((1, 3, 4))).dtype)
            return torch.zeros(len(hsi), 3)

    @contextlib.contextmanager
    def bar(label, total):
        steps.append(total)
        yield lambda pixels: steps.append(-pixels)

    monkeypatch.setattr("mmmae.training.finetuning.maps.progress_bar", bar)
    write_maps(Model(12, 3), subjects, labels, [0], tmp_path, count=1, window=3, precision="bf16")
    assert found == [torch.bfloat16]
    assert steps == [24 * 20, -24 * 20]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "pixels", "--tile", "8"], "which takes whole scenes"),
        (["--task", "segmentation", "--window", "9"], "--window is for --task pixels"),
        (["--task", "pixels", "--window", "8"], "window is 8, expected an odd number"),
        (["--task", "segmentation"], "one subject has labels, and the model sees it whole: cut it into tiles"),
        (["--task", "segmentation", "--split", "masks:a,b"], "--labels names the labels, unless --split masks"),
    ],
    ids=str,
)
def test_what_one_scene_can_not_do_is_one_line(scene, tmp_path, capsys, words, message):
    words = ["--hsi", str(scene / "hsi"), "--labels", str(scene / "gt.npy"), *words]
    assert main([*SCRATCH, *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()

"""What commands find wrong before they read data or weights, and what they read only once."""

import numpy as np
import pytest

import mmmae
from mmmae.cli import main
from mmmae.data import PairedFolder
from mmmae.model import pretrained
from mmmae.model.encoder import LinearClassifier
from mmmae.model.finetuned import save_finetuned
from mmmae.model.heads import SegmentationModel

MODELS = ("encoder", "model", "scenes", "subjects")
pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with cubes, an encoder, a whole model, and fine-tuned models of scenes and of subjects."""
    folder = tmp_path_factory.mktemp("models")
    model = mmmae.fast_model("tiny", image_size=16, patch=(3, 8, 8), aux={})
    encoder = model.hsi_encoder()
    encoder.save_pretrained(folder / "encoder")
    model.save_pretrained(folder / "model")
    save_finetuned(folder / "scenes", SegmentationModel(encoder, 2), ["water", "wood"])
    save_finetuned(folder / "subjects", LinearClassifier(encoder, 2), ["water", "wood"])
    (folder / "hsi").mkdir()
    np.save(folder / "hsi" / "a.npy", np.random.default_rng(0).random((12, 16, 16)))
    return folder


@pytest.fixture
def no_work(monkeypatch):
    """Let tests fail that read a sample or measure statistics."""
    for name in ("__getitem__", "_compute"):
        monkeypatch.setattr(PairedFolder, name, lambda *arguments: pytest.fail("work began"))


@pytest.mark.parametrize(
    ("command", "folder", "message"),
    [
        ("predict --model scenes --out {out}/file", None, "out/file: is not a folder"),
        ("predict --model scenes --out {out}/lost", None, "out/lost: is a link to no folder"),
        ("predict --model scenes --out {out}/lost/maps", None, "out/lost is a link to no folder"),
        ("predict --model scenes --out /proc/maps", None, "/proc/maps: can't write into /proc"),
        ("predict --model scenes --out {out}", "a.tif", "a.tif is a folder, expected a file"),
        ("predict --model scenes --out {out}", "a.png", "a.png is a folder, expected a file"),
        ("predict --model subjects --out {out}", "classes.csv", "classes.csv is a folder, expected a file"),
        ("encode --encoder encoder --out {out}/a.npz", "a.npz", "a.npz is a folder, expected a file"),
        ("encode --encoder encoder --out /proc/a.npz", None, "/proc: can't write into /proc"),
        ("encode --raster --encoder encoder --out {out}/file", None, "out/file: is not a folder"),
        ("encode --raster --encoder encoder --out {out}", "a.tif", "a.tif is a folder"),
        ("reconstruct --model model --out {out}/file", None, "out/file: is not a folder"),
        ("reconstruct --model model --out {out}", "errors.csv", "errors.csv is a folder"),
        ("finetune --scratch --task classification --labels x --out {out}/lost", None, "out/lost: is a link"),
        ("pretrain --preset tiny --batch 1 --out {out}", "reconstruction.png", "reconstruction.png is a folder"),
        ("data cache --out {out}/lost", None, "out/lost: is a link to no folder"),
        ("data shard --out {out}/lost", None, "out/lost: is a link to no folder"),
    ],
)
def test_an_output_that_can_not_be_written_is_found_before_any_work(
    folders, tmp_path, command, folder, message, no_work, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").touch()
    (out / "lost").symlink_to(out / "none")
    if folder:
        (out / folder).mkdir()
    words = [str(folders / word) if word in MODELS else word.replace("{out}", str(out)) for word in command.split()]
    assert main([*words, "--hsi", str(folders / "hsi")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--split masks:{out}/none.mat", "none.mat', expected TRAIN,TEST, two folders or files"),
        ("--split masks:{out}/one.npz", "one.npz: cannot be read as a .npz file: no array 'TE'"),
        ("--split masks:{out}/small.npz --normalization {out}/n.json", "the labels are 8 x 16, the cube is 16 x 16"),
        ("--labels {out}/a.npy --split table:{out}/none.csv", "none.csv: no such file"),
        ("--labels {out}/a.npy --split table:{out}/b.csv", "b.csv names 'b', which is not a subject"),
        ("--labels {out}/a.npy --split pixels:3", "split is 'pixels:3', expected a share in (0, 1)"),
        ("--labels {out}/a.npy --split blocks:x", "split is 'blocks:x', expected blocks:PIXELS"),
        ("--labels {out}/a.npy --split halves", "split is 'halves', expected subjects:SHARE"),
        ("--labels {out}/a.npy --fold 9/3", "fold is '9/3', expected K/N"),
        ("--labels {out}/a.npy --validation b", "validation names 'b', expected names of labelled subjects"),
    ],
)
def test_a_wrong_split_is_found_before_statistics_are_measured(folders, tmp_path, options, message, no_work, capsys):
    labels = np.random.default_rng(0).integers(0, 3, (16, 16))
    np.save(tmp_path / "a.npy", labels)
    np.savez(tmp_path / "one.npz", TR=labels)
    np.savez(tmp_path / "small.npz", TR=labels[:8], TE=labels[:8])
    (tmp_path / "b.csv").write_text("name,group\nb,1\n")
    command = ["finetune", "--scratch", "--preset", "tiny", "--task", "pixels", "--hsi", str(folders / "hsi")]
    assert main([*command, "--out", str(tmp_path / "run"), *options.replace("{out}", str(tmp_path)).split()]) == 2
    assert message in capsys.readouterr().err


def test_statistics_that_can_not_be_written_are_not_measured(folders, no_work):
    subjects = PairedFolder(folders / "hsi", normalization="/proc/n.json")
    with pytest.raises(OSError, match="/proc: can't write into /proc"):
        _ = subjects.normalization


@pytest.mark.parametrize("options", [["--bands", "0-5"], ["--raster"]], ids=" ".join)
def test_weights_are_read_once(folders, tmp_path, options, monkeypatch):
    read, load = [], pretrained.load_tensors

    def counted(path):
        read.append(path)
        return load(path)

    monkeypatch.setattr(pretrained, "load_tensors", counted)
    command = ["encode", "--encoder", str(folders / "encoder"), "--hsi", str(folders / "hsi")]
    assert main([*command, "--out", str(tmp_path / "a.npz"), *options]) == 0
    assert len(read) == 1

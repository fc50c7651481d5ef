"""A scene of Indian Pines' kind is classified better by one command than by support vector machines (minutes)."""

import json

import numpy as np
import pytest
from scipy.ndimage import uniform_filter
from sklearn.metrics import cohen_kappa_score, recall_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from mmmae.cli import main
from mmmae.data import PairedFolder
from mmmae.training.finetuning.labels import read_mask_labels
from mmmae.training.finetuning.pixel_splits import TEST, TRAIN
from mmmae.training.finetuning.splits import divide
from tests.training.fields_scene import fields_scene


@pytest.mark.parametrize("split", ["pixels:0.1", "blocks:16"])
def test_one_command_classifies_fields_at_least_as_well_as_an_svm_of_means(split, tmp_path, capsys):
    cube, labels = fields_scene()
    for name, values in (("hsi", cube), ("labels", labels)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "fields.npy", values)
    side, overlap = (32, 16) if split.startswith("pixels") else (16, 8)  # a block takes the tiles that show it
    command = ["finetune", "--scratch", "--preset", "tiny", "--set", f"image_size={side}", "--set", "patch=40,4,4"]
    command += ["--hsi", str(tmp_path / "hsi"), "--task", "segmentation", "--labels", str(tmp_path / "labels")]
    command += ["--ignore", "0", "--tile", str(side), "--overlap", str(overlap), "--split", split, "--augment"]
    command += ["--layer-decay", "1", "--learning-rate", "3e-3", "--epochs", "8", "--keep", "last"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())

    subjects = PairedFolder(tmp_path / "hsi", image_size=side, tile=side, overlap=overlap)
    parts = divide(subjects, read_mask_labels(tmp_path / "labels", subjects, ignore=0), split)
    assert found["pixels"] == parts.pixels()
    means = np.stack([uniform_filter(band.astype(float), 7) for band in cube])
    network = f"OA {found['accuracy']:.3f}, AA {found['average_accuracy']:.3f}, kappa {found['kappa']:.3f}"
    lines, accuracies = [f"\n{split}: network {network}"], []
    for name, features in (("spectra", cube), ("means of 7 x 7", means)):
        accuracy, line = svm(features, labels, parts.roles["fields"].numpy())
        accuracies.append(accuracy)
        lines.append(f"SVM of {name} {line}")
    with capsys.disabled():
        print(*lines, sep="; ")
    assert found["accuracy"] >= max(accuracies)


def svm(features, labels, roles):
    """Return the accuracy of a support vector machine on the pixels to test with, and a line with its scores."""
    machine = make_pipeline(StandardScaler(), SVC(C=100))
    machine.fit(features[:, roles == TRAIN].T.astype(float), labels[roles == TRAIN])
    predicted, target = machine.predict(features[:, roles == TEST].T.astype(float)), labels[roles == TEST]
    accuracy = float((predicted == target).mean())
    average = recall_score(target, predicted, labels=np.unique(target), average="macro")
    kappa = cohen_kappa_score(target, predicted)
    return accuracy, f"OA {accuracy:.3f}, AA {average:.3f}, kappa {kappa:.3f}"

"""Runs with several seeds are summarised, and every run leaves a page with all of its figures."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mmmae.cli import main
from mmmae.training.finetuning.page import notes, write_page
from mmmae.training.finetuning.repeats import summarise


class Page(HTMLParser):
    """The words and the sources of pictures in a page; every element that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.words, self.pictures, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def report_of(accuracy, labelled):
    """Return a report of two classes, the second of which has `labelled` held-out labels."""
    scores = {"accuracy": accuracy, "average_accuracy": 0.5, "kappa": 0.25, "f1_macro": 0.5, "miou": 0.5}
    by_class = {name: {"labelled": n, "accuracy": accuracy, "training": 5} for name, n in (("a", 4), ("b", labelled))}
    extra = {"keep": "best", "split": "0.1 of the pixels", "neighbours": True, "not_trained": ["b"]}
    return {**scores, "classes": by_class, "confusion": [[4, 0], [labelled, 0]], **extra}


def test_scores_of_seeds_are_means_with_sample_deviations():
    found = summarise([report_of(0.5, 2), report_of(0.7, 0), report_of(0.9, 1)], [3, 4, 5])
    assert found["accuracy"] == {
        "mean": pytest.approx(0.7),
        "deviation": pytest.approx(math.sqrt((0.2**2 + 0.2**2) / 2)),
        "values": [0.5, 0.7, 0.9],
    }
    assert (found["classes"]["b"]["labelled"], found["classes"]["b"]["training"]) == (3, 15)
    assert found["classes"]["b"]["accuracy"]["values"] == [0.5, 0.9]  # nothing was held out of it with seed 4
    assert found["confusion"] == [[12, 0], [3, 0]]
    assert (found["seeds"], found["not_trained"]) == ([3, 4, 5], ["b"])
    json.dumps(found)


def test_a_page_says_what_makes_scores_too_good_and_forges_nothing(tmp_path):
    (tmp_path / "confusion.png").write_bytes(b"png")
    report = report_of(0.5, 2)
    assert [note.split(";")[1].split()[0] for note in notes(report)[:2]] == ["--keep", "--split"]
    assert notes({**report, "keep": "last", "neighbours": False, "not_trained": []}) == []
    report["classes"]["<script>\n&"] = report["classes"].pop("b")
    write_page(tmp_path, "a <b>", {"data": "<i>"}, report)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert {"a <b>", "<i>", "<script>\\n&", "0.5000"} <= set(page.words)
    assert page.pictures == ["data:image/png;base64,cG5n"]


def test_each_seed_has_a_split_and_a_run_of_its_own(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (4, 4)).repeat(4, 0).repeat(4, 1)
    (tmp_path / "hsi").mkdir()
    np.save(tmp_path / "hsi" / "s.npy", (rng.normal(size=(4, 6))[labels].transpose(2, 0, 1)).astype(np.float32))
    np.save(tmp_path / "gt.npy", labels.astype(np.uint8))
    words = [
        "--scratch",
        "--preset",
        "tiny",
        "--set",
        "image_size=8",
        "--set",
        "patch=3,4,4",
        "--tile",
        "8",
        "--overlap",
        "4",
    ]
    words += ["--hsi", str(tmp_path / "hsi"), "--labels", str(tmp_path / "gt.npy"), "--task", "segmentation"]
    words += ["--split", "pixels:0.2", "--epochs", "1", "--seed", "7", "--out", str(tmp_path / "run")]
    assert main(["finetune", *words, "--seeds", "2"]) == 0
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    single = [json.loads((tmp_path / "run" / f"seed-{seed}" / "metrics.json").read_text()) for seed in (7, 8)]
    assert report["accuracy"]["values"] == [run["accuracy"] for run in single]
    assert report["kappa"]["mean"] == pytest.approx(np.mean([run["kappa"] for run in single]))
    assert report["kappa"]["deviation"] == pytest.approx(np.std([run["kappa"] for run in single], ddof=1))
    assert single[0]["confusion"] != single[1]["confusion"]
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert len(page.pictures) == 2
    assert f"{report['miou']['deviation']:.4f}" in page.words
    kept = ", ".join(str(run["epoch"]) for run in single)
    assert {"segmentation", "kept epochs", kept, "full", "7, 8", "labels to train with"} <= set(page.words)
    for number, (name, row) in enumerate(single[0]["classes"].items()):
        assert (name, row["training"]) == (str(number), round(0.2 * (labels == number).sum()))  # though tiles overlap
        assert report["classes"][name]["training"] == 2 * row["training"]
    printed = capsys.readouterr().out
    assert re.search(rf"Cohen's kappa: {report['kappa']['mean']:.4f} ± ", printed)
    assert main(["finetune", *words, "--seeds", "2"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["finetune", *words, "--seeds", "0"]) == 2

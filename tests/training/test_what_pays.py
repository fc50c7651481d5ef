"""The experiment on pretraining does what it says: regressions on held-out eyes, of what features hold."""

import json
import sys

import pytest
import torch
from torch.nn import functional as F

import mmmae
from tests.training.experiments import loaded


@pytest.fixture(scope="module")
def experiment():
    with loaded("pretraining") as module:
        yield module


@pytest.fixture(scope="module")
def eyes(experiment):
    course = experiment.QUICK
    return experiment.Eyes(0, course.eyes, course.labelled, course.held_out)


@pytest.fixture
def run_quickly(experiment, tmp_path, monkeypatch):
    """Return a function that runs the experiment with two steps, and returns the results so far."""
    threads = torch.get_num_threads()

    def run(*methods):
        command = ["pretraining.py", "--out", str(tmp_path), "--quick", "--seeds", "0"]
        monkeypatch.setattr(sys, "argv", [*command, *(["--methods", *methods] if methods else [])])
        experiment.main()
        return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    yield run
    torch.set_num_threads(threads)


def test_a_stopped_run_goes_on(experiment, run_quickly, capsys):
    assert [result["method"] for result in run_quickly("mean spectrum")] == ["mean spectrum"]
    results = run_quickly("mean spectrum", "default", "whole bands masked")
    assert [result["method"] for result in results] == ["mean spectrum", "default", "whole bands masked"]
    assert results[1]["steps"] == 2
    for result in results[1:]:
        steps = {round(share * result["steps"]) for share in experiment.MEASURED}
        assert [figures["step"] for figures in result["figures"]] == sorted(steps)
        assert all(1 <= figures["rank"] <= 64 and 0 <= figures["between"] <= 1 for figures in result["figures"])
    assert "| whole bands masked |" in capsys.readouterr().out


def test_held_out_eyes_are_not_trained_on(experiment, eyes):
    trained = [sample.hsi for sample in eyes.unlabelled]
    is_trained = [any(torch.equal(hsi, other) for other in trained) for hsi in eyes.hsi]
    assert is_trained == [True] * experiment.QUICK.labelled + [False] * experiment.QUICK.held_out
    assert len(trained) == experiment.QUICK.eyes


def test_a_regression_finds_what_features_hold_and_no_more(experiment, eyes):
    generator = torch.Generator().manual_seed(0)
    mixed = eyes.amounts @ torch.randn(5, 9, generator=generator) + 3
    assert min(experiment.regress(mixed, eyes).values()) > 0.999
    melanin = experiment.regress(eyes.amounts[:, :, :1], eyes)
    assert melanin["melanin"] > 0.999
    assert max(melanin[name] for name in ("xanthophyll", "vein")) < 0.6
    noise = torch.randn(mixed.shape, generator=generator)
    assert max(experiment.regress(noise, eyes).values()) < 0.1


class MeanSpectra(torch.nn.Module):
    """Stands for an encoder whose tokens are the mean spectra of patches."""

    config = mmmae.MMMAEConfig.preset("tiny", image_size=64, patch=(3, 8, 8), dim=3, heads=1)

    def forward(self, hsi):
        return F.avg_pool2d(hsi[:, 0], 8).unflatten(1, (4, 3)).flatten(3).transpose(2, 3).flatten(1, 2)


def test_fine_tuning_finds_what_tokens_hold_however_the_eyes_lie(experiment, eyes, monkeypatch):
    mixing = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(eyes, "amounts", F.avg_pool2d(eyes.hsi[:, 0], 8).flatten(2).transpose(1, 2) @ mixing)
    assert min(experiment.fine_tune(MeanSpectra(), eyes, 400, 0.1).values()) > 0.9


def test_features_that_tell_places_alone_do_not_differ_between_eyes(experiment):
    generator = torch.Generator().manual_seed(0)
    places, own = torch.randn(1, 12, 8, generator=generator), torch.randn(6, 12, 8, generator=generator)
    alike, unlike = experiment.spread(places.expand(6, -1, -1)), experiment.spread(own)
    assert alike["between"] == pytest.approx(0, abs=1e-6)
    assert alike["std"] == pytest.approx(0, abs=1e-6)
    assert unlike["between"] > 0.7
    assert unlike["rank"] > 7

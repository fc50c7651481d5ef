"""MMMAE_AUTOTUNE=1: what is measured, what is remembered, and what a broken memory costs."""

import json

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")

from mmmae_kernels.gpu import autotune  # noqa: E402
from mmmae_kernels.gpu.config import Config, Launch  # noqa: E402


class Kernel:
    class fn:
        __name__ = "_kernel"


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """Tunes a launch of three configs that take the given milliseconds; counts the measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_found", {})
    measured = []

    def tune(times=(3.0, 1.0, 2.0), width=8, target="sm80"):
        configs = tuple(Config({"BLOCK": size}) for size in (16, 32, 64))
        launch = Launch(Kernel, lambda c: (1,), {"x_ptr": torch.zeros(width), "D": width}, configs)
        sizes = {16: times[0], 32: times[1], 64: times[2]}
        started = []

        def start(launch, config):
            started.append(config.constants["BLOCK"])

        def measure(run):
            run()
            measured.append(started[-1])
            return sizes[started[-1]]

        return autotune.fastest(launch, target, start, measure).constants["BLOCK"]

    tune.measured = measured
    return tune


def test_the_fastest_config_is_found_once_for_each_shape_and_architecture(tuner):
    assert [tuner(), tuner(), tuner(width=9), tuner(target="sm90")] == [32] * 4
    assert len(tuner.measured) == 9


def test_it_is_remembered_on_disk(tuner, monkeypatch):
    tuner()
    monkeypatch.setattr(autotune, "_found", {})
    assert tuner(times=(0.0, 1.0, 1.0)) == 32
    assert len(tuner.measured) == 3
    tuner(width=9)
    assert len(json.loads(autotune.cache_file().read_text())) == 2
    assert [file.name for file in autotune.cache_file().parent.iterdir()] == ["autotune.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', "\x00"])
def test_a_file_that_holds_nothing_useful_is_measured_anew(tuner, text):
    autotune.cache_file().parent.mkdir(parents=True)
    autotune.cache_file().write_text(text)
    assert tuner() == 32
    (config,) = json.loads(autotune.cache_file().read_text()).values()
    assert "32" in config


def test_a_choice_that_no_longer_exists_is_measured_anew(tuner, monkeypatch):
    tuner()
    (key,) = json.loads(autotune.cache_file().read_text())
    autotune.cache_file().write_text(json.dumps({key: "a config of yesterday"}))
    monkeypatch.setattr(autotune, "_found", {})
    assert tuner() == 32
    assert len(tuner.measured) == 6


def test_a_home_that_cannot_be_written_costs_a_search_and_no_more(tuner, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tuner() == 32


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_variable_switches_it_on(monkeypatch, value, on):
    monkeypatch.delenv("MMMAE_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("MMMAE_AUTOTUNE", value)
    assert autotune.is_on() == on

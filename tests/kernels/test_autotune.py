"""MMMAE_AUTOTUNE=1: what is measured, when, by which process, what is stored, and what can be measured at all."""

import json
import multiprocessing
import os
import threading

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import triton
import triton.language as tl

from mmmae_kernels import decoder_tokens, patch_embed, patch_l2_loss, use_backend
from mmmae_kernels.aot.cases import CASES as COMPILED
from mmmae_kernels.aot.rows import Recorder
from mmmae_kernels.gpu import autotune
from mmmae_kernels.gpu.config import Config, Launch
from mmmae_kernels.gpu.executors import execute_by

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") == "0", reason="needs TRITON_INTERPRET=1")


class Kernel:
    class fn:
        __name__ = "_kernel"


TIMES = {16: 3.0, 32: 1.0, 64: 2.0}


def launch_of(width=8):
    configs = tuple(Config({"BLOCK": size}) for size in TIMES)
    return Launch(Kernel, lambda c: (1,), {"x_ptr": torch.zeros(width), "D": width}, configs)


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """Tunes a launch of three configs that take the given milliseconds; counts the measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_found", {})
    measured = []

    def tune(times=TIMES, width=8, target="sm80"):
        started = []

        def start(launch, config):
            started.append(config.constants["BLOCK"])

        def measure(run):
            run()
            measured.append(started[-1])
            return times[started[-1]]

        config = autotune.fastest(launch_of(width), target, start, measure)
        return None if config is None else config.constants["BLOCK"]

    tune.measured = measured
    return tune


def results():
    return sorted(autotune.folder().iterdir())


def test_the_fastest_config_is_found_once_for_each_shape_and_architecture(tuner):
    assert [tuner(), tuner(), tuner(width=9), tuner(target="sm90")] == [32] * 4
    assert len(tuner.measured) == 9


def test_it_is_remembered_on_disk(tuner, monkeypatch):
    tuner()
    monkeypatch.setattr(autotune, "_found", {})
    assert tuner(times={16: 0.0, 32: 1.0, 64: 1.0}) == 32
    assert len(tuner.measured) == 3
    tuner(width=9)
    assert len(results()) == 2


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"config": 1}', '{"config": "a config of yesterday"}', "\x00"])
def test_a_file_that_holds_nothing_useful_is_measured_anew(tuner, monkeypatch, text):
    tuner()
    (file,) = results()
    file.write_text(text)
    monkeypatch.setattr(autotune, "_found", {})
    assert tuner(times={16: 0.0, 32: 1.0, 64: 1.0}) == 16
    assert "'BLOCK': 16" in json.loads(file.read_text())["config"]


@pytest.mark.parametrize("way", ["a file in the way", "a folder in the way"])
def test_a_home_that_cannot_be_written_costs_a_search_and_no_more(tuner, tmp_path, monkeypatch, way):
    if way == "a file in the way":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        tuner()
        (file,) = results()
        file.unlink()
        file.mkdir()
        monkeypatch.setattr(autotune, "_found", {})
    assert tuner() == 32
    assert tuner() == 32


def test_a_file_system_without_locks_costs_no_more_than_a_search_in_each_process(tuner, monkeypatch):
    def unlockable(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(autotune.fcntl, "flock", unlockable)
    assert tuner() == 32


def test_while_one_measures_the_others_are_told_so_and_have_the_result_later(tuner):
    """In threads, which lock a file against each other as processes do."""
    measuring, go_on, found = threading.Event(), threading.Event(), []

    def slow(run):
        measuring.set()
        assert go_on.wait(timeout=600)
        run()
        return 1.0

    first = threading.Thread(target=lambda: found.append(autotune.fastest(launch_of(), "sm80", lambda *_: None, slow)))
    first.start()
    assert measuring.wait(timeout=600)
    autotune._found.clear()
    assert tuner() is None
    assert tuner(width=9) == 32
    go_on.set()
    first.join()
    assert tuner() == found[0].constants["BLOCK"] == 16
    assert len(tuner.measured) == 3  # of the other width


def measure_in_a_process(home, width, begun, go_on, blocks):
    """Tune a launch; where `go_on` is given, report the begin of each measurement and wait for it."""
    os.environ["XDG_CACHE_HOME"] = home

    def measure(run):
        begun.release()
        if go_on is not None:
            go_on.wait()
        return 1.0

    config = autotune.fastest(launch_of(width), "sm80", lambda *_: None, measure)
    blocks.put(None if config is None else config.constants["BLOCK"])


@pytest.fixture
def processes():
    """Starts processes that tune, and ends those that are left."""
    context, started = multiprocessing.get_context("fork"), []

    def start(*arguments):
        started.append(context.Process(target=measure_in_a_process, args=arguments, daemon=True))
        started[-1].start()
        return started[-1]

    start.context = context
    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_process_that_ends_while_it_measures_leaves_the_search_to_others(tuner, tmp_path, processes):
    begun, never, blocks = processes.context.Semaphore(0), processes.context.Event(), processes.context.Queue()
    process = processes(str(tmp_path), 8, begun, never, blocks)
    begun.acquire()
    assert tuner() is None
    process.kill()
    process.join()
    assert tuner() == 32


def test_no_result_is_lost_where_processes_write_at_once(tmp_path, monkeypatch, processes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    begun, go_on, blocks = processes.context.Semaphore(0), processes.context.Event(), processes.context.Queue()
    started = [processes(str(tmp_path), width, begun, go_on, blocks) for width in range(1, 5)]
    for _ in started:
        begun.acquire()  # all measure now
    go_on.set()
    assert [blocks.get() for _ in started] == [16] * 4
    assert len({json.loads(file.read_text())["launch"] for file in results()}) == 4


def test_nothing_is_measured_or_loaded_while_a_graph_is_captured(tuner, monkeypatch):
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert tuner() is None
    assert tuner.measured == []
    capturing[0] = False
    assert tuner() == 32
    capturing[0] = True
    assert tuner() == 32
    autotune._found.clear()  # as in a process that did not run the stored config before its capture
    assert tuner() is None


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_variable_switches_it_on(monkeypatch, value, on):
    monkeypatch.delenv("MMMAE_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("MMMAE_AUTOTUNE", value)
    assert autotune.is_on() == on


class Twice:
    """Runs launches by Triton's interpreter, those that would be tuned a second time, which must change nothing."""

    target = "sm80"

    def __init__(self):
        self.repeated = set()

    def __call__(self, launch):
        config = launch.configs[-1]
        launch.kernel[launch.grid](**launch.arguments, **config.constants)
        if len(launch.configs) > 1:
            tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
            once = {name: tensor.clone() for name, tensor in tensors.items()}
            launch.kernel[launch.grid](**launch.arguments, **config.constants)
            self.repeated.add(launch.kernel.fn.__name__)
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, once[name], rtol=0, atol=0, equal_nan=True, msg=name)
        return config


@triton.jit
def double(x_ptr, BLOCK: tl.constexpr):
    place = x_ptr + tl.arange(0, BLOCK)
    tl.store(place, 2 * tl.load(place))


def tuned_kernels():
    """Return the names of the kernels that are compiled ahead of time with more than one config."""
    recorder = Recorder("sm80")
    with execute_by(recorder):
        for case in COMPILED.values():
            case(torch.bfloat16)
    return {launch.kernel.fn.__name__ for launch, _ in recorder.launches.values() if len(launch.configs) > 1}


@interpreted
def test_a_launch_that_is_tuned_can_be_repeated():
    """Else it would be measured on what it has changed itself, and the result would start from that."""

    volume, weight, ids = torch.randn(1, 1, 2, 8, 8), torch.randn(16, 1, 1, 4, 4), torch.tensor([[0, 3, 5]])
    rows, twice = torch.randn(1, 3, 16), Twice()
    with execute_by(twice), use_backend("triton"):
        patch_l2_loss(rows, volume, weight, None, ids)
        patch_embed(volume.requires_grad_(), weight.requires_grad_(), None, ids).sum().backward()
        decoder_tokens(rows[:, :2], rows[0, 0], torch.tensor([[2, 0, 1]]), rows[0])
    assert twice.repeated == tuned_kernels()


@interpreted
def test_a_kernel_that_changes_what_it_reads_is_found():
    configs = Config({"BLOCK": 32}, warps=1), Config({"BLOCK": 16}, warps=1)
    with pytest.raises(AssertionError, match="x_ptr"):
        Twice()(Launch(double, lambda c: (1,), {"x_ptr": torch.ones(32)}, configs))

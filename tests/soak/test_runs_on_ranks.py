"""Runs on two processes with all that a run may do besides, and how they end when something is wrong."""

import os
import signal
import time

import pytest

from tests.training.test_pretrain import logged
from tests.training.test_torchrun import SECONDS, start

SHORT = ["--steps", "4", "--checkpoint-every", "2"]


@pytest.mark.parametrize(
    "options",
    [
        [
            "--strategy",
            "fsdp",
            "--accumulate",
            "2",
            "--validation",
            "4",
            "--pictures-every",
            "2",
            "--precision",
            "bf16",
        ],
        ["--strategy", "ddp", "--ema", "0.9", "--validation", "4", "--patience", "1", "--workers", "1"],
        ["--strategy", "ddp", "--precision", "16", "--accumulate", "2", "--compile"],
    ],
    ids=" ".join,
)
def test_a_run_on_two_processes_ends_well(tmp_path, options):
    run = start("--out", str(tmp_path), *SHORT, *options)
    printed, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, printed
    assert "warn" not in printed.lower(), printed
    assert (tmp_path / "encoder" / "model.safetensors").exists()
    assert sorted(logged(tmp_path, "loss")) == [0, 1, 2, 3]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_ends_all_processes_with_the_layer(tmp_path, strategy):
    run = start("--out", str(tmp_path), *SHORT, "--strategy", strategy, "--learning-rate", "1e30", "--clip", "1e30")
    printed, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 1
    assert "process 0: the loss is " in printed
    assert "and the first that is not finite is in " in printed


def test_a_run_that_is_asked_to_end_ends(tmp_path):
    run = start("--out", str(tmp_path), "--checkpoint-every", "1")
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(run.pid, signal.SIGTERM)
    run.communicate(timeout=60)  # torchrun gives its processes half a minute
    assert run.returncode != 0

"""Runs on two processes, as torchrun starts them: what they learn, and how they end when something is wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmmae.cli import main
from tests.training.test_pretrain import logged, losses

ROOT = Path(__file__).parents[2]
RUN = ["--subjects", "8", "--set", "image_size=32", "--set", "patch=[3,8,8]", "--set", "decoder_depth=2"]
RUN += ["--warmup", "1", "--checkpoint-every", "3", "--flip"]
SHORT = ["--steps", "4", "--checkpoint-every", "2"]
TWELVE = ["--steps", "12"]
MMMAE = ["mmmae"]


def start(program, *options):
    """Start `python -m PROGRAM OPTIONS` on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return subprocess.Popen(
        [*command, *program, "pretrain", *RUN, "--batch", "2", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    "options",
    [
        "--strategy fsdp --accumulate 2 --validation 4 --pictures-every 2 --precision bf16",
        "--strategy ddp --ema 0.9 --validation 4 --patience 1 --workers 1",
        "--strategy ddp --precision 16 --accumulate 2 --compile",
    ],
)
def test_a_run_on_two_processes_ends_well(tmp_path, options):
    run = start(MMMAE, "--out", str(tmp_path), *SHORT, *options.split())
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    assert "warn" not in printed.lower(), printed
    assert (tmp_path / "encoder" / "model.safetensors").exists()
    assert sorted(logged(tmp_path, "loss")) == [0, 1, 2, 3]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_ends_all_processes_with_the_layer(tmp_path, strategy):
    run = start(
        MMMAE, "--out", str(tmp_path), *SHORT, "--strategy", strategy, "--learning-rate", "1e30", "--clip", "1e30"
    )
    printed, _ = run.communicate()
    assert run.returncode == 1
    assert re.search(r"process 0: the loss is (nan|inf) in step \d, of phantom-", printed)
    assert "and the first that is not finite is in " in printed


def test_a_run_that_is_asked_to_end_ends(tmp_path):
    run = start(MMMAE, "--out", str(tmp_path), "--steps", "100000", "--checkpoint-every", "1")
    while not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    os.kill(run.pid, signal.SIGTERM)
    run.communicate()
    assert run.returncode != 0


def test_a_killed_rank_ends_the_run_with_a_message_and_it_goes_on_with_the_losses_of_one_process(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(["pretrain", "--out", str(whole), *RUN, *TWELVE, "--batch", "4"]) == 0
    undisturbed = losses(whole)

    quick = ["tests.training.quick_runs"]
    killed = start([*quick, "--kill", "14"], "--out", str(out), *TWELVE, "--strategy", "fsdp")  # in the eighth step
    printed, _ = killed.communicate()
    assert killed.returncode == 1
    assert "Signal 9 (SIGKILL)" in printed
    assert "mmmae FAILED" in printed or "quick_runs FAILED" in printed

    resumed = start(quick, "--out", str(out), *TWELVE, "--strategy", "ddp", "--resume", "auto")
    printed, _ = resumed.communicate()
    assert resumed.returncode == 0, printed
    assert "12 steps of 2 subjects on each of 2 processes" in printed
    again = losses(out, 1)
    assert sorted(again) == list(range(6, 12))
    for step, loss in again.items():
        assert loss == pytest.approx(undisturbed[step], rel=1e-5), step

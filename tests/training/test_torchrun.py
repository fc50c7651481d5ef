"""Runs on several processes as torchrun starts them: what they learn, and what happens when one is killed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mmmae.cli import main
from tests.training.test_pretrain import losses

RUN = ["--subjects", "8", "--set", "image_size=32", "--set", "patch=[3,8,8]", "--set", "decoder_depth=2"]
RUN += ["--steps", "60", "--warmup", "1", "--checkpoint-every", "3", "--flip"]
SECONDS = 120


def start(*options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "mmmae", "pretrain", *RUN, "--batch", "2", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def process_of_rank(parent, rank):
    """Return the process id of a rank, one of torchrun's children."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    for child in children.stdout.split():
        with open(f"/proc/{child}/environ", "rb") as file:
            if f"RANK={rank}".encode() in file.read().split(b"\0"):
                return int(child)
    raise LookupError(f"no child of {parent} has rank {rank}")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, to tell which process has which rank")
def test_a_killed_rank_ends_the_run_with_a_message_and_it_goes_on_with_the_losses_of_one_process(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(["pretrain", "--out", str(whole), *RUN, "--batch", "4"]) == 0
    undisturbed = losses(whole)

    killed = start("--out", str(out), "--strategy", "fsdp")
    deadline = time.monotonic() + SECONDS
    while not (out / "checkpoints" / "last.ckpt").exists():
        assert killed.poll() is None, killed.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process_of_rank(killed.pid, 1), signal.SIGKILL)
    printed, _ = killed.communicate(timeout=SECONDS)
    assert killed.returncode == 1
    assert "Signal 9 (SIGKILL)" in printed
    assert "mmmae FAILED" in printed

    resumed = start("--out", str(out), "--strategy", "ddp", "--resume", "auto")
    printed, _ = resumed.communicate(timeout=SECONDS)
    assert resumed.returncode == 0, printed
    assert "60 steps of 2 subjects on each of 2 processes" in printed
    again = losses(out, 1)
    assert min(again) % 3 == 0
    assert max(again) == 59
    for step, loss in again.items():
        assert loss == pytest.approx(undisturbed[step], rel=1e-5), step


def test_a_loss_that_is_not_finite_is_diagnosed_where_weights_are_shared(tmp_path):
    run = start("--out", str(tmp_path / "out"), "--strategy", "fsdp", "--learning-rate", "1e30", "--clip", "1e30")
    printed, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 1
    assert "the loss is nan in step 2, of phantom-" in printed
    assert "the first that is not finite is in" in printed

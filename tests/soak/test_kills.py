"""A run that is killed at random moments, again and again: each checkpoint can be read, and the losses stay."""

import random
import subprocess
import sys
import time

import torch

from mmmae.training.checkpoints import read_checkpoint
from tests.training.test_pretrain import logged

KILLS = 20
STEPS = 1_000_000  # more than the kills leave time for
RUN = ["--subjects", "6", "--set", "image_size=32", "--set", "patch=[3,8,8]", "--batch", "2", "--missing", "0.3"]
RUN += ["--steps", str(STEPS), "--warmup", "1", "--checkpoint-every", "1", "--flip", "--crop", "0.5", "--ema", "0.9"]


def start(out):
    command = [sys.executable, "-m", "mmmae", "pretrain", *RUN, "--out", str(out), "--resume", "auto"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_twenty_kills_leave_no_unreadable_checkpoint_and_change_no_loss(tmp_path):
    chance = random.Random(0)
    out, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    made = 0
    for _ in range(KILLS):
        run = start(out)
        wait_for_a_checkpoint_after(last, made + chance.randrange(10, 30), run)
        time.sleep(chance.uniform(0, 0.2))  # somewhere in the steps that follow
        run.kill()
        assert run.wait() == -9, run.stderr.read()
        checkpoint = read_checkpoint(last)
        assert checkpoint["global_step"] > made
        assert all(torch.isfinite(weight).all() for weight in checkpoint["state_dict"].values())
        made = checkpoint["global_step"]

    undisturbed = tmp_path / "undisturbed"
    run = start(undisturbed)
    wait_for_a_checkpoint_after(undisturbed / "checkpoints" / "last.ckpt", made, run)
    run.kill()
    run.wait()
    expected = logged(undisturbed, "loss")
    compared = 0
    for version in range(KILLS):
        for step, loss in logged(out, "loss", version).items():
            if step in expected:
                assert loss == expected[step], (version, step)
                compared += 1
    assert compared >= made / 2  # a log is flushed every tenth step, and a kill takes what was not


def wait_for_a_checkpoint_after(last, step, run):
    while not (last.exists() and read_checkpoint(last)["global_step"] > step):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)

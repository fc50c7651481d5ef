"""Processes and their launchers: torchrun's are one run, and in a job of SLURM a single process trains alone."""

import pytest
import torch

import mmmae
from mmmae.phantom import Phantom
from mmmae.training.distributed import World, find_world
from mmmae.training.finetuning.finetune import _trainer
from mmmae.training.finetuning.settings import FinetuneSettings
from mmmae.training.pretrain import pretrain
from mmmae.training.settings import PretrainSettings

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture
def environment(monkeypatch):
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PTY_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_in_a_job_of_several_tasks_a_process_that_srun_did_not_start_trains_alone(tmp_path, environment):
    environment(JOB)
    settings = PretrainSettings(steps=1, batch=2)
    config = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8))
    pretrain(config, Phantom(2, image_size=32), tmp_path, settings)
    assert (tmp_path / "model" / "model.safetensors").exists()
    _trainer(tmp_path / "finetune", FinetuneSettings(precision="32"), torch.device("cpu"))


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "33215"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NAME": "interactive"},
    ],
    ids=["a step of one task", "a terminal of srun --pty", "an interactive job"],
)
def test_a_shell_of_slurm_starts_a_single_process(environment, variables):
    environment(JOB | variables)
    assert find_world() == World(0, 1, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS is 4, but .*start them by torchrun, or srun --ntasks=1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but each process would train alone; start them by torchrun$"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, expected a whole number"),
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": "-1"}, "RANK is '-1' in the environment, expected a whole number"),
    ],
    ids=["srun", "another launcher", "no number", "a negative rank"],
)
def test_processes_that_would_not_train_together_are_refused_in_one_line(environment, variables, message):
    environment(variables)
    with pytest.raises(ValueError, match=message):
        find_world()

"""Training by several processes: find them, shard the model among them, and gather its weights."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..config import MMMAEConfig
from ..model.fast import FastModel, fast_model
from ..model.inputs import is_distributed
from ..model.layers import Block, Stream

TIMEOUT = timedelta(minutes=10)  # of a wait for other processes: longer than any step, shorter than a night


class World(NamedTuple):
    """The processes of a run: this one alone, or those that torchrun started."""

    rank: int
    ranks: int
    ranks_of_node: int

    @property
    def nodes(self) -> int:
        """The number of machines, which have equally many processes."""
        return self.ranks // self.ranks_of_node


def find_world() -> World:
    """Read the processes of the run from the environment variables of torchrun.

    A process that SLURM did not start together with others, as in a shell of `salloc` or in a batch script without
    `srun`, trains alone, however many tasks the job may have.

    Raises:
        ValueError: the machines have different numbers of processes, another launcher started several, or a variable
            is no number.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        launchers = {
            "WORLD_SIZE": "",
            "OMPI_COMM_WORLD_SIZE": "",
            "SLURM_STEP_NUM_TASKS": ", or srun --ntasks=1 for one",
        }
        for name, alone in launchers.items():
            if _number(name, 1) > 1 and not (name == "SLURM_STEP_NUM_TASKS" and _in_slurm_shell()):
                raise ValueError(
                    f"{name} is {os.environ[name]}, but each process would train alone; start them by torchrun{alone}"
                )
        return World(0, 1, 1)
    world = World(*(_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
    if world.ranks % world.ranks_of_node:
        raise ValueError(
            f"{world.ranks_of_node} of {world.ranks} processes are on this machine, expected equally many on each"
        )
    return world


def _number(name: str, default: int | None = None) -> int:
    """Return the number in an environment variable."""
    text = os.environ.get(name, str(default) if default is not None else "")
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r} in the environment, expected a whole number >= 0, as torchrun sets it")
    return int(text)


def _in_slurm_shell() -> bool:
    """Return whether this process was started from an interactive shell, by hand, in a job step of several tasks."""
    return "SLURM_PTY_PORT" in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def cluster_environment(world: World) -> list[LightningEnvironment]:
    """Return the plugin by which Lightning does not look for a cluster's launcher where a process trains alone.

    In every SLURM job it would take its process for one of those that `srun` starts, and compare their number with the
    number of devices.
    """
    return [LightningEnvironment()] if world.ranks == 1 else []


def choose_strategy(name: str, world: World) -> Any:
    """Return Lightning's strategy for these processes, by the name `ddp` or `fsdp`."""
    if world.ranks == 1:
        return "auto"
    if name == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=world.ranks, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=TIMEOUT
        )
    return DDPStrategy(timeout=TIMEOUT)


def compile_blocks(model: FastModel, mode: str = "default") -> None:
    """Compile each transformer block by `torch.compile` in one of its modes, in place.

    Compiled one by one, all blocks of a kind share one compilation, and hooks of DDP and FSDP2 and the collectives of
    the losses stay outside of the graphs.
    """
    for block in (*model.blocks, *model.decoder_blocks):
        block.compile(mode=mode)


def shard(model: FastModel, mesh: DeviceMesh) -> None:
    """Shard weights, gradients and optimiser states of a model among the processes of a mesh (FSDP2), in place.

    The weights of each transformer block are gathered when it runs and freed after it; the rest is gathered once a
    step.
    """
    blocks = [block for block in (*model.blocks, *model.decoder_blocks) if isinstance(block, Block)]
    for block in blocks:
        last = block is blocks[-1]
        if not last:
            block.register_forward_hook(_keep_bias)
        # Backward begins with the last block: if freed, its weights would be gathered again at once.
        fully_shard(block, mesh=mesh, reshard_after_forward=not last)
    fully_shard(model, mesh=mesh)


def _keep_bias(block: Block, arguments: object, stream: Stream) -> Stream:
    """Copy the bias with which a stream leaves a block: it is added after the block's weights are freed."""
    bias = stream.residual_bias
    return Stream(stream.x, stream.residual, None if bias is None else bias.clone())


def gather_objects(value: Any) -> list[Any]:
    """Return the value that each process passes, in the order of ranks."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def whole_model(model: FastModel, config: MMMAEConfig) -> FastModel:
    """Return a copy of a model with whole weights on the CPU; every process must call this if it is sharded."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.random.fork_rng(devices=()):
        whole = fast_model(config)
    whole.load_state_dict({name: weight.cpu() for name, weight in weights.items() if isinstance(weight, Tensor)})
    return whole

"""Several processes: which there are, how the model is shared among them, and its whole weights again."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..config import MMMAEConfig
from ..model.fast import FastModel, fast_model
from ..model.inputs import is_distributed
from ..model.layers import Block, Stream

TIMEOUT = timedelta(minutes=10)  # that a process waits for the others: longer than any step, and no whole night


class World(NamedTuple):
    """The processes of a run: one, or those that torchrun started."""

    rank: int
    ranks: int
    ranks_of_node: int

    @property
    def nodes(self) -> int:
        """Machines, each with equally many processes."""
        return self.ranks // self.ranks_of_node


def find_world() -> World:
    """What torchrun says in the environment.

    Raises:
        ValueError: the machines have different numbers of processes, or something else started several.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
            if int(os.environ.get(name, 1)) > 1:
                raise ValueError(
                    f"{name} is {os.environ[name]}: each process would train alone; start them by torchrun"
                )
        return World(0, 1, 1)
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
    if world.ranks % world.ranks_of_node:
        raise ValueError(f"{world.ranks} processes, {world.ranks_of_node} on this machine: start equally many on each")
    return world


def choose_strategy(name: str, world: World) -> Any:
    """Lightning's strategy `ddp` or `fsdp` for these processes."""
    if world.ranks == 1:
        return "auto"
    if name == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=world.ranks, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=TIMEOUT
        )
    return DDPStrategy(timeout=TIMEOUT)


def compile_blocks(model: FastModel, mode: str = "default") -> None:
    """Hand the transformer blocks to `torch.compile` in one of its modes, one by one, in place.

    Between them DDP's and FSDP2's hooks and the collectives of the losses stay out of the graphs, and all blocks of a
    kind are compiled once.
    """
    for block in (*model.blocks, *model.decoder_blocks):
        block.compile(mode=mode)


def shard(model: FastModel, mesh: DeviceMesh) -> None:
    """Share weights, gradients and optimiser states of a model among the processes of a mesh (FSDP2), in place.

    The weights of a transformer block of encoder and decoder are gathered when it runs, and dropped behind it; the rest
    is gathered once a step.
    """
    blocks = [block for block in (*model.blocks, *model.decoder_blocks) if isinstance(block, Block)]
    for block in blocks:
        last = block is blocks[-1]
        if not last:
            block.register_forward_hook(_keep_bias)
        # Backward begins with the last block: dropped, its weights would be gathered again at once.
        fully_shard(block, mesh=mesh, reshard_after_forward=not last)
    fully_shard(model, mesh=mesh)


def _keep_bias(block: Block, arguments: object, stream: Stream) -> Stream:
    """Copy the bias that a stream leaves a block with: it is added when the block's weights are dropped already."""
    bias = stream.residual_bias
    return Stream(stream.x, stream.residual, None if bias is None else bias.clone())


def of_all_processes(value: Any) -> list[Any]:
    """A plain value of each process, by rank."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def whole_model(model: FastModel, config: MMMAEConfig) -> FastModel:
    """A model with the whole weights of one that may be shared among processes, on the CPU; all of them take part."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.random.fork_rng(devices=()):
        whole = fast_model(config)
    whole.load_state_dict({name: weight.cpu() for name, weight in weights.items() if isinstance(weight, Tensor)})
    return whole

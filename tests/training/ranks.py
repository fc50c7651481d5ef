"""Training steps on several processes over gloo, for comparison with one process that has the joined batch."""

from __future__ import annotations

import faulthandler
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh

import mmmae
from mmmae.training.distributed import compile_blocks, shard

# modality -> which of the four samples have it: some everywhere, some on one rank alone, some nowhere
PRESENT = {
    "ir": (True, True, True, True),
    "af": (True, False, False, True),
    "thickness": (False, False, True, True),
}
FIELDS: dict[str, Any] = {"image_size": 64, "patch": (3, 16, 16), "conditioning_dropout": 0.3}
PRINT_AFTER = 300  # seconds behind which a rank prints where it is, and goes on


@dataclass(frozen=True)
class Case:
    """A way to share a training step among processes.

    Args:
        strategy: "ddp" or "fsdp".
        fields: config fields.
        compiled: "nothing", "blocks", or the "whole" model.
    """

    strategy: str
    fields: dict[str, Any] = field(default_factory=dict)
    compiled: str = "nothing"

    def __str__(self) -> str:
        return "-".join([self.strategy, *self.fields, f"{self.compiled}_compiled"])


class Answer(NamedTuple):
    """A rank's results: the mean loss of all ranks, the ids of its visible tokens, and its gradients by name."""

    loss: float
    ids_keep: NDArray[Any]
    gradients: dict[str, NDArray[Any]]


def joined_batch() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return the volumes, images and presence flags of all ranks' samples."""
    generator = torch.Generator().manual_seed(1)
    hsi = torch.randn(4, 1, 12, 64, 64, generator=generator)
    aux = {name: torch.randn(4, 1, 64, 64, generator=generator) for name in PRESENT}
    return hsi, aux, {name: torch.tensor(flags) for name, flags in PRESENT.items()}


def valid() -> Tensor:
    """Return masks of valid pixels, of which each rank's samples have another share."""
    mask = torch.ones(4, 64, 64, dtype=torch.bool)
    mask[0], mask[1, :32], mask[3, :, :16] = False, False, False
    return mask


def build(case: Case) -> mmmae.FastModel:
    """Return the model of a case, with the same weights on every call."""
    torch.manual_seed(0)
    return mmmae.fast_model("tiny", **{**FIELDS, **case.fields})


def steps_of_ranks(ranks: int, cases: Sequence[Case], folder: Path) -> dict[str, list[Answer]]:
    """Run one training step of each case on `ranks` processes; return case -> the answers of all ranks."""
    context = multiprocessing.get_context("spawn")
    address = f"file://{folder / 'rendezvous'}"
    waiting: dict[Any, int] = {}  # receiver -> rank
    processes = []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_run, args=(rank, ranks, cases, address, sender), daemon=True))
        processes[-1].start()
        sender.close()  # the process has its own: when it ends, the receiver gets an EOFError
        waiting[receiver] = rank
    answers: dict[int, list[Answer]] = {}
    while waiting:
        for ready in wait(list(waiting)):
            rank = waiting.pop(ready)
            try:
                answers[rank] = cast(Connection, ready).recv()
            except EOFError:
                for process in processes:
                    process.kill()
                raise RuntimeError(f"rank {rank} has ended without an answer; it prints why") from None
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return {str(case): [answers[rank][number] for rank in range(ranks)] for number, case in enumerate(cases)}


def check(case: Case, answers: Sequence[Answer]) -> None:
    """Compare masks, loss and every gradient of all ranks with those of one process that has the joined batch."""
    model = build(case)
    hsi, aux, present = joined_batch()
    output = model(hsi, aux, present, valid(), seed=7)
    output.loss.backward()
    masks = torch.cat([torch.from_numpy(answer.ids_keep) for answer in answers])
    assert torch.equal(masks, output.mask.ids_keep)
    for loss, _, gradients in answers:
        assert loss == pytest.approx(output.loss.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            gradient = torch.from_numpy(gradients[name])
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert math.isfinite(gradient.norm())
            assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), name


def _run(rank: int, ranks: int, cases: Sequence[Case], address: str, sender: Connection) -> None:
    faulthandler.dump_traceback_later(PRINT_AFTER, repeat=True)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    sender.send([_step(rank, ranks, case) for case in cases])
    distributed.barrier()
    distributed.destroy_process_group()


def _step(rank: int, ranks: int, case: Case) -> Answer:
    """Run a rank's step. Its wrapper is local: one that outlives its process group may wait for it forever."""
    hsi, aux, present = joined_batch()
    rows = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    # A rank whose samples all lack a modality does not even have the image.
    aux = {name: image[rows] for name, image in aux.items() if present[name][rows].any()}
    model = build(case)
    if case.compiled == "blocks":
        compile_blocks(model)
    elif case.compiled == "whole":
        model.compile()
    if case.strategy == "fsdp":
        shard(model, init_device_mesh("cpu", (ranks,)))
        wrapped: torch.nn.Module = model
    else:
        # The wrapper averages gradients, and fails if a parameter gets none.
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    output = wrapped(hsi[rows], aux, {name: flags[rows] for name, flags in present.items()}, valid()[rows], seed=7)
    output.loss.backward()
    loss = output.loss.detach().clone()
    distributed.all_reduce(loss)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        gradients[name] = (gradient.full_tensor() if case.strategy == "fsdp" else gradient).numpy()
    with pytest.raises(ValueError, match=r"the ranks have batches of \[1, 2"):
        build(Case("ddp"))(hsi[: rank + 1], seed=7)
    return Answer((loss / ranks).item(), output.mask.ids_keep.numpy(), gradients)

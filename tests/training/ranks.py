"""Training steps on several processes over gloo, for comparison with one process that has the joined batch."""

import contextlib
import faulthandler
import math
import queue
from dataclasses import dataclass, field

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh

import mmmae
from mmmae.training.distributed import compile_blocks, shard

# modality -> which of the four samples have it: some everywhere, some on one rank alone, some nowhere
PRESENT = {
    "ir": (True, True, True, True),
    "af": (True, False, False, True),
    "thickness": (False, False, True, True),
}
FIELDS = {"image_size": 64, "patch": (3, 16, 16), "conditioning_dropout": 0.3}
SECONDS = 120


@dataclass(frozen=True)
class Case:
    """A way to share a step: `ddp` or `fsdp`, config fields, and whether `blocks` or the `whole` model is compiled."""

    strategy: str
    fields: dict = field(default_factory=dict)
    compiled: str = "nothing"

    def __str__(self):
        return "-".join([self.strategy, *self.fields, f"{self.compiled}_compiled"])


def joined_batch():
    generator = torch.Generator().manual_seed(1)
    hsi = torch.randn(4, 1, 12, 64, 64, generator=generator)
    aux = {name: torch.randn(4, 1, 64, 64, generator=generator) for name in PRESENT}
    return hsi, aux, {name: torch.tensor(flags) for name, flags in PRESENT.items()}


def valid():
    """The parts of the batch count different shares of their tokens."""
    mask = torch.ones(4, 64, 64, dtype=torch.bool)
    mask[0], mask[1, :32], mask[3, :, :16] = False, False, False
    return mask


def build(case):
    torch.manual_seed(0)
    return mmmae.fast_model("tiny", **{**FIELDS, **case.fields})


def expected(case):
    """The step of one process with the joined batch: its model, with gradients, and its output."""
    model = build(case)
    hsi, aux, present = joined_batch()
    output = model(hsi, aux, present, valid(), seed=7)
    output.loss.backward()
    return model, output


def steps_of_ranks(ranks, cases, folder):
    """What each rank finds in each case: case -> list over ranks of (loss of all, visible tokens, gradients)."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    address = f"file://{folder / 'rendezvous'}"
    processes = [context.Process(target=_run, args=(rank, ranks, cases, address, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    answers = {}
    while len(answers) < ranks:
        with contextlib.suppress(queue.Empty):
            rank, answer = results.get(timeout=1)
            answers[rank] = answer
        codes = [process.exitcode for process in processes]
        assert not any(codes), f"exit codes of the ranks: {codes}"
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return {str(case): [answers[rank][number] for rank in range(ranks)] for number, case in enumerate(cases)}


def check(case, answers):
    """The answers of all ranks are those of one process, within rounding: masks, loss and every gradient."""
    model, output = expected(case)
    masks = torch.cat([torch.from_numpy(ids) for _, ids, _ in answers])
    assert torch.equal(masks, output.mask.ids_keep)
    for loss, _, gradients in answers:
        assert loss == pytest.approx(output.loss.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            gradient = torch.from_numpy(gradients[name])
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert math.isfinite(gradient.norm())
            assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), name


def _run(rank, ranks, cases, address, results):
    faulthandler.dump_traceback_later(SECONDS - 20, exit=True)  # a rank that hangs says where
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    results.put((rank, [_step(rank, ranks, case) for case in cases]))
    distributed.barrier()
    distributed.destroy_process_group()


def _step(rank, ranks, case):
    """What a rank finds. The wrapper ends with it: one that outlives its process group may wait for it forever."""
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
        wrapped = model
    else:
        # The wrapper averages gradients, and fails if a parameter gets none.
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    output = wrapped(hsi[rows], aux, {name: flags[rows] for name, flags in present.items()}, valid()[rows], seed=7)
    output.loss.backward()
    loss = output.loss.detach().clone()
    distributed.all_reduce(loss)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = (gradient.full_tensor() if case.strategy == "fsdp" else gradient).numpy()
    with pytest.raises(ValueError, match=r"the ranks have batches of \[1, 2"):
        build(Case("ddp"))(hsi[: rank + 1], seed=7)
    return (loss / ranks).item(), output.mask.ids_keep.numpy(), gradients

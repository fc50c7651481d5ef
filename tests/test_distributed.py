"""Several ranks against one process with the joined batch: masks, both losses and every gradient, over gloo."""

import faulthandler

import pytest
import torch
from torch import distributed, multiprocessing

import mmmae

# modality -> which of the four samples have it: some everywhere, some on one rank alone, some nowhere
PRESENT = {
    "ir": (True, True, True, True),
    "af": (True, False, False, True),
    "thickness": (False, False, True, True),
}
FIELDS = {"image_size": 64, "patch": (3, 16, 16), "conditioning_dropout": 0.3}


def joined_batch():
    generator = torch.Generator().manual_seed(1)
    hsi = torch.randn(4, 1, 12, 64, 64, generator=generator)
    aux = {name: torch.randn(4, 1, 64, 64, generator=generator) for name in PRESENT}
    return hsi, aux, {name: torch.tensor(flags) for name, flags in PRESENT.items()}


def valid():
    """The two halves of the batch count different shares of their tokens."""
    mask = torch.ones(4, 64, 64, dtype=torch.bool)
    mask[0], mask[1, :32], mask[3, :, :16] = False, False, False
    return mask


def build(fields):
    torch.manual_seed(0)
    return mmmae.fast_model("tiny", **FIELDS, **fields)


def run(rank, ranks, fields, address, results):
    faulthandler.dump_traceback_later(100, exit=True)  # a rank that hangs says where
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    results.put(step(rank, ranks, fields))
    distributed.barrier()
    distributed.destroy_process_group()


def step(rank, ranks, fields):
    """What a rank finds. The wrapper ends with it: one that outlives its process group may wait for it forever."""
    hsi, aux, present = joined_batch()
    rows = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    # A rank whose samples all lack a modality does not even have the image.
    aux = {name: image[rows] for name, image in aux.items() if present[name][rows].any()}
    model = build(fields)
    # The wrapper averages gradients, and fails if a parameter gets none.
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    output = wrapped(hsi[rows], aux, {name: flags[rows] for name, flags in present.items()}, valid()[rows], seed=7)
    output.loss.backward()
    loss = output.loss.detach().clone()
    distributed.all_reduce(loss)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"the ranks have batches of \[1, 2\] samples"):
        model(hsi[: rank + 1], seed=7)
    return rank, (loss / ranks).item(), output.mask.ids_keep.numpy(), gradients


@pytest.mark.parametrize(
    "fields", [{}, {"symmetric": True}, {"decode_fraction": 0.5, "activation_checkpointing": True}], ids="-".join
)
def test_two_ranks_equal_one_process_with_the_joined_batch(fields, tmp_path):
    model = build(fields)
    hsi, aux, present = joined_batch()
    expected = model(hsi, aux, present, valid(), seed=7)
    expected.loss.backward()

    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    address = f"file://{tmp_path / 'rendezvous'}"
    processes = [context.Process(target=run, args=(rank, 2, fields, address, results)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = sorted((results.get(timeout=120) for _ in processes), key=lambda answer: answer[0])
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0

    masks = torch.cat([torch.from_numpy(ids) for _, _, ids, _ in answers])
    assert torch.equal(masks, expected.mask.ids_keep)
    for _, loss, _, gradients in answers:
        assert loss == pytest.approx(expected.loss.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            gradient = torch.from_numpy(gradients[name])
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), name

"""Batches say which images are real, and loaders and Lightning can move them."""

import pickle
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from mmmae.data import Batch, Sample, collate
from mmmae.phantom import Phantom


def sample(name, aux=(), size=4, bands=3):
    generator = torch.Generator().manual_seed(len(name))
    return Sample(
        name,
        torch.rand(1, bands, size, size, generator=generator),
        {modality: torch.rand(1, size, size, generator=generator) + 1 for modality in aux},
        torch.ones(size, size, dtype=torch.bool),
    )


def test_absent_images_are_zeros_that_present_tells_apart():
    samples = [sample("a", ["ir"]), sample("bb", ["af", "ir"]), sample("ccc")]
    batch = collate(samples, ["ir", "af", "thickness"])
    assert batch.names == ["a", "bb", "ccc"]
    assert len(batch) == 3
    assert batch.hsi.shape == (3, 1, 3, 4, 4)
    assert batch.valid.shape == (3, 4, 4)
    assert batch.valid.dtype == torch.bool
    assert list(batch.aux) == ["ir", "af"]
    assert {name: flags.tolist() for name, flags in batch.present.items()} == {
        "ir": [True, True, False],
        "af": [False, True, False],
        "thickness": [False, False, False],
    }
    assert all(flags.dtype == torch.bool for flags in batch.present.values())
    assert torch.equal(batch.aux["af"][1], samples[1].aux["af"])
    assert torch.equal(batch.aux["af"][[0, 2]], torch.zeros(2, 1, 4, 4))
    assert torch.equal(batch.hsi[2], samples[2].hsi)


def test_modalities_that_are_not_asked_for_are_dropped():
    batch = collate([sample("a", ["ir", "af"])], {"ir": 1})
    assert list(batch.aux) == ["ir"]
    assert list(batch.present) == ["ir"]


def test_samples_that_differ_in_shape_are_refused_by_name():
    with pytest.raises(ValueError, match=r"hsi of 'bb' has shape .* of 'a' "):
        collate([sample("a"), sample("bb", bands=4)], [])
    odd = sample("bb", ["ir"])
    odd.aux["ir"] = torch.zeros(1, 5, 5)
    with pytest.raises(ValueError, match=r"ir of 'bb' has shape \[1, 5, 5\], of 'a' \[1, 4, 4\]; .* image_size"):
        collate([sample("a", ["ir"]), odd], ["ir"])
    with pytest.raises(ValueError, match="no samples"):
        collate([], ["ir"])


def test_lightning_moves_a_batch_and_knows_its_size():
    from lightning.fabric.utilities.apply_func import move_data_to_device
    from lightning.pytorch.utilities.data import extract_batch_size

    batch = collate([sample("a", ["ir"]), sample("bb")], ["ir", "af"])
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch)
    assert moved.names == ["a", "bb"]
    tensors = [moved.hsi, moved.valid, *moved.aux.values(), *moved.present.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.hsi.device.type == "cpu"
    assert extract_batch_size(batch) == 2


def test_a_loader_pins_every_tensor_of_a_batch(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: (pinned.append(tensor.shape), tensor)[1])
    batch = collate([sample("a", ["ir"]), sample("bb")], ["ir", "af"])
    assert isinstance(pin_memory(batch), Batch)
    assert len(pinned) == 5


def test_a_batch_survives_pickling():
    batch = collate([sample("a", ["ir"])], ["ir"])
    assert torch.equal(pickle.loads(pickle.dumps(batch)).aux["ir"], batch.aux["ir"])


def test_a_loader_makes_batches():
    data = Phantom(5, image_size=16, bands=3, missing=0.5)
    loader = DataLoader(data, batch_size=2, collate_fn=partial(collate, modalities=data.modalities))
    batches = list(loader)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [name for batch in batches for name in batch.names] == data.names
    assert all(list(batch.present) == list(data.modalities) for batch in batches)

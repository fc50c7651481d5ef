"""Workers that read samples: their errors are those of a process that reads by itself, and their end is told."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mmmae.data import Batch
from mmmae.data.loading import LostWorkerError, SampleLoader, lost_workers_told


class Odd(Exception):
    """An error that can't be sent to another process."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


class Numbers(Dataset):
    """The numbers from 0, with an error at some of them."""

    def __init__(self, errors):
        self.errors = errors

    def __len__(self):
        return 12

    def __getitem__(self, index):
        error = self.errors.get(index)
        if error == "kill" and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        if error is not None:
            raise error
        return index


def total(samples):
    if samples == [8, 9]:
        raise ValueError("8 and 9 do not fit")
    return sum(samples)


def read(errors, workers):
    """Return the batches before the first error, and the error."""
    loader = SampleLoader(Numbers(errors), num_workers=workers, collate_fn=total, batch_size=2)
    batches = []
    try:
        for batch in loader:
            batches.append(batch)
    except Exception as error:
        return batches, error
    return batches, None


@pytest.mark.parametrize(
    "errors",
    [{}, {5: ValueError("a.tif: is damaged\nat its end")}, {5: FileNotFoundError(2, "No such file", "a.tif")}],
    ids=["of the collation", "of two lines", "of the system"],
)
def test_an_error_of_a_worker_is_that_of_the_reading(errors):
    (alone, first), (read_by_workers, second) = (read(errors, workers) for workers in (0, 2))
    assert read_by_workers == alone
    assert (type(second), str(second)) == (type(first), str(first))
    assert "Traceback" in str(second.__cause__)
    assert "__getitem__" in str(second.__cause__) or "total" in str(second.__cause__)


def test_an_error_that_can_not_be_sent_is_told():
    _, error = read({3: Odd(1, 2)}, 1)
    assert (type(error), str(error)) == (RuntimeError, "Odd: 1 2")


def test_a_killed_worker_is_told_and_nothing_hangs():
    batches, error = read({5: "kill"}, 1)
    assert batches == [1, 5][: len(batches)]
    assert isinstance(error, LostWorkerError)
    assert "a worker process that reads data was killed, as the system does where memory is short" in str(error)


@pytest.mark.parametrize(
    ("status", "told"), [(-signal.SIGKILL, "was killed"), (-signal.SIGBUS, "shm, .*, is full"), (3, "has ended")]
)
def test_how_a_worker_ended_is_told_where_pytorch_does_not_know_it(monkeypatch, status, told):
    class Missed:
        _workers = (SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=status))

        def __next__(self):
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    monkeypatch.setattr(DataLoader, "__iter__", lambda self: Missed())
    with pytest.raises(LostWorkerError, match=told):
        next(iter(SampleLoader(Numbers({}), num_workers=2, collate_fn=total)))


def test_a_full_shared_memory_is_told_with_the_advice_and_other_errors_pass():
    with (
        pytest.raises(LostWorkerError, match=r"/dev/shm, .*, is full; .*; try again"),
        lost_workers_told("; try again"),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. ")
    with pytest.raises(RuntimeError, match="another"), lost_workers_told():
        raise RuntimeError("another")


def as_samples(numbers):
    volume = torch.tensor(numbers).reshape(-1, 1, 1, 1, 1).float()
    return Batch(["a"], volume, {}, {}, volume[:, 0, 0] > 0)


@pytest.mark.parametrize("collate", [lambda numbers: {"a": (torch.tensor(numbers),)}, as_samples])
def test_a_batch_that_does_not_fit_into_shared_memory_is_told_and_nothing_hangs(monkeypatch, collate):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    loader = SampleLoader(Numbers({}), num_workers=1, collate_fn=collate)
    with pytest.raises(LostWorkerError, match=r"/dev/shm, .*, is full; .*No space left"):
        next(iter(loader))

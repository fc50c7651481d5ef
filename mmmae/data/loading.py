"""Loading of samples by worker processes, whose errors are those of a process that reads by itself."""

import contextlib
import dataclasses
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

T_co = TypeVar("T_co", covariant=True)

FULL = "/dev/shm, in which workers hand over samples, is full; use fewer workers or smaller batches"


class LostWorkerError(ChildProcessError):
    """A worker process was killed, or ended without an error that it could send."""


class SampleLoader(DataLoader[T_co]):
    """A DataLoader with workers whose errors arrive as they were raised, and in the order of the samples.

    PyTorch's own raises another error of the same type, with the worker's traceback as its message. Here that traceback
    is the cause of the error.

    Args:
        dataset: read by the workers.
        num_workers: number of worker processes; 0: this process reads.
        collate_fn: makes a batch of a list of samples, or returns a sample if there are no batches.
        options: further arguments of DataLoader.

    Raises:
        LostWorkerError: on iteration, a worker was killed.
    """

    def __init__(
        self, dataset: Dataset[Any], *, num_workers: int, collate_fn: Callable[[Any], T_co], **options: Any
    ) -> None:
        if num_workers > 0:
            dataset, collate_fn = _Caught(dataset), _Collated(collate_fn)
        super().__init__(dataset, num_workers=num_workers, collate_fn=collate_fn, **options)

    def __iter__(self) -> Any:
        """Yield batches; raise the error of a worker in place of the batch that it did not read."""
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (OSError, EOFError) as error:
                if self.num_workers == 0:
                    raise
                raise _lost(error, batches) from error  # a connection to a worker that is gone
            except RuntimeError as error:
                if not _tells_of_a_lost_worker(error):
                    raise
                raise _lost(error, batches) from error
            if isinstance(batch, _Failure):
                raise batch.error from _WorkerTraceback(batch.traceback)
            yield batch


@contextlib.contextmanager
def lost_workers_told(advice: str = "") -> Iterator[None]:
    """Raise LostWorkerError in place of PyTorch's errors about lost workers.

    PyTorch raises them in whatever the process does at that moment, so that the whole work with a loader needs this.

    Args:
        advice: what to do, added to the message.
    """
    try:
        yield
    except LostWorkerError as error:
        raise LostWorkerError(f"{error}{advice}") from error
    except RuntimeError as error:
        if not _tells_of_a_lost_worker(error):
            raise
        raise LostWorkerError(f"{_lost(error)}{advice}") from error


def _tells_of_a_lost_worker(error: RuntimeError) -> bool:
    return str(error).startswith("DataLoader worker")


def _lost(error: Exception, batches: Any = None) -> LostWorkerError:
    """Return the error that tells how a worker ended: by the error of PyTorch, or by how the workers of `batches` did.

    PyTorch names the signal only if it has learnt of it before it misses the worker.
    """
    told = f"{error} {error.__cause__ or ''}"
    ends = {worker.exitcode for worker in getattr(batches, "_workers", ())}
    if "Bus error" in told or -signal.SIGBUS in ends:
        reason = f"was ended by a bus error: {FULL}"
    elif "Killed" in told or -signal.SIGKILL in ends:
        reason = "was killed, as the system does where memory is short; use fewer workers"
    else:
        reason = f"has ended ({' '.join(str(error).split())}); its memory may have been short: use fewer workers"
    return LostWorkerError(f"a worker process that reads data {reason}")


class _Failure(NamedTuple):
    """What a worker sends in place of a sample or batch that it can't read."""

    error: Exception
    traceback: str


class _WorkerTraceback(Exception):
    """The traceback of a worker, as the cause of the error that it raised."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class _Caught(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            return _failure(error)


class _Collated:
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        for sample in samples if isinstance(samples, list) else [samples]:
            if isinstance(sample, _Failure):
                return sample
        try:
            batch = self.collate(samples)
        except Exception as error:
            return _failure(error)
        try:
            _share(batch)
        except RuntimeError as error:
            return _failure(
                LostWorkerError(f"a worker process that reads data can't hand over a batch: {FULL} ({error})")
            )
        return batch


def _share(batch: Any) -> None:
    """Move the tensors of a batch into shared memory.

    The thread that sends a batch would do it, but only prints an error, and the process that waits for it hangs.
    """
    if isinstance(batch, Tensor):
        batch.share_memory_()  # type: ignore[no-untyped-call]
    elif isinstance(batch, Mapping):
        _share(list(batch.values()))
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            _share(part)
    elif dataclasses.is_dataclass(batch):
        _share([getattr(batch, field.name) for field in dataclasses.fields(batch)])


def _failure(error: Exception) -> _Failure:
    told = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of an error with arguments of its own
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return _Failure(error, told)

"""Time on a GPU: by CUDA events around work that is queued, never by the wall clock of a host that waits for each call.

Three ways to time, for three questions. `queued`: how long the device takes, for a kernel or two. `replayed`: the same
for a run of many kernels, captured as a graph. `followed`: how long a user waits for a run, host included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

Run = Callable[[], object]

QUEUED_DEVICES = {"cuda"}  # types of device that work off a queue; a dry run adds the CPU
WARM_UPS = 3  # runs before a capture: kernels are compiled and loaded, libraries make their handles and workspaces
HEAD_START = 4_000_000  # cycles that the device spins while the host queues runs, some 2 ms
L2_CACHE = 64 * 2**20  # bytes, where torch does not say it
MOST_COPIES = 16


class CaptureError(RuntimeError):
    """A run could not be captured as a graph."""


def is_queued(device: str) -> bool:
    """Return whether a type of device works off a queue, so that its time is that between events."""
    return device in QUEUED_DEVICES


def copies_for(moved: int) -> int:
    """Return how many copies of a run's tensors to take in turn, so that none is in the L2 cache when it is used again.

    Args:
        moved: bytes that one run reads and writes.
    """
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", L2_CACHE) or L2_CACHE
    return max(1, min(MOST_COPIES, math.ceil(3 * cache / max(moved, 1))))


def queued(runs: Sequence[Run], rounds: int) -> list[float]:
    """Return the seconds of each round on the device; the rounds take `runs` in turn.

    The device spins first, so that the host has queued the rounds before the first one starts.
    """
    for run in runs:
        run()
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
    marks = [_mark()]
    for number in range(rounds):
        runs[number % len(runs)]()
        marks.append(_mark())
    torch.cuda.synchronize()
    return _between(marks)


def replayed(runs: Mapping[str, Sequence[Run]], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return by name the seconds that a run takes on the device in each round, and why others could not be captured.

    The runs of a name do the same on tensors of their own. They are captured one after another as a graph, and the
    graphs of all names are replayed in turn, one of each a round.
    """
    graphs, refused = {}, {}
    for name, copies in runs.items():
        try:
            graphs[name] = _captured(copies)
        except CaptureError as error:
            refused[name] = str(error)
    for graph in graphs.values():
        graph.replay()
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
    marks = [_mark()]
    for _ in range(rounds):
        for graph in graphs.values():
            graph.replay()
            marks.append(_mark())
    torch.cuda.synchronize()
    taken = _between(marks)
    return {
        name: [seconds / len(runs[name]) for seconds in taken[place :: len(graphs)]]
        for place, name in enumerate(graphs)
    }, refused


def followed(runs: Mapping[str, Run], rounds: int, repeat: int) -> dict[str, list[float]]:
    """Return by name the seconds that a run takes in each round if the host starts it `repeat` times without waiting.

    That is the time of the host or of the device, whichever is longer. A round begins with an empty queue: else a run
    that the host is slow to start would be started ahead, while the device still works on another.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(once(run, repeat))
    return taken


def once(run: Run, repeat: int = 1) -> float:
    """Return the seconds that a run takes from an empty queue on, the mean of `repeat` in a row."""
    torch.cuda.synchronize()
    start = _mark()
    for _ in range(repeat):
        run()
    end = _mark()
    torch.cuda.synchronize()
    return _between([start, end])[0] / repeat


def _captured(copies: Sequence[Run]) -> torch.cuda.CUDAGraph:
    graph, stream, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for run in copies:
            for _ in range(WARM_UPS):
                run()
    current.wait_stream(stream)
    torch.cuda.synchronize()
    # Backward runs in another thread: it may do what would be refused to the capturing one.
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for run in copies:
                run()
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # a capture that fails at its end leaves its own
        cause: BaseException = error
        while isinstance(cause.__context__, RuntimeError):  # the first error says which operation it was
            cause = cause.__context__
        raise CaptureError(str(cause).partition("\n")[0]) from error
    return graph


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(marks: Sequence[torch.cuda.Event]) -> list[float]:
    return [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(marks)]

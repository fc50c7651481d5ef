"""A comparison of models: each contender in its own process, as its user would run it, timed in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.contenders import PEERS, Task

ROOT = Path(__file__).parents[1]
BASELINE = "reference, SDPA"
TOLERANCE = 1e-4  # float32: of gradients, which add up rounding through all blocks twice
PATIENCE = 900.0  # seconds for one answer, a compilation included


class Entry(NamedTuple):
    """A contender, its task, and whether its process keeps freed memory (`mmmae.tune_cpu`)."""

    contender: str
    task: Task
    kept: bool = False


@dataclasses.dataclass
class Result:
    """The times and counts of a contender in a race.

    Args:
        error: why it took no part or dropped out; empty otherwise.
        seconds: duration of each round.
        resident_bytes: largest memory of its process.
        counts: `peak_bytes`, `saved_bytes` and `macs`, where they were counted.
        gemms, limit: seconds that the matrix products of its linear layers take alone, and with attention's products at
            the speed of a square one; known for the fast model where it was counted.
    """

    error: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)
    resident_bytes: int = 0
    counts: dict[str, int | None] = dataclasses.field(default_factory=dict)
    gemms: float | None = None
    limit: float | None = None


class RunnerError(RuntimeError):
    """Raised when a contender's process gave no answer, or an error."""


class Runner:
    """The process of an entry; a context manager that ends it."""

    module = "bench.worker"  # run by the process
    timer = threading.Timer  # ends a process that does not answer

    def __init__(self, entry: Entry) -> None:
        self.first = {"contender": entry.contender, "kept": entry.kept, "task": dataclasses.asdict(entry.task)}
        self.messages = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in __exit__
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.getenv("PYTHONPATH"))))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            text=True,
            env=environment,
        )

    def begin(self) -> None:
        """Tell the process to build model and data, and do not wait for it."""
        with contextlib.suppress(BrokenPipeError):  # `ready` will raise
            self._send(self.first)

    def ready(self) -> None:
        """Wait until model and data are built; raises as `ask` does."""
        self._answer()

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Send a question of `bench.worker.ANSWERS` and return the answer.

        Raises:
            RunnerError: if the process failed, died, or took longer than `PATIENCE`.
        """
        try:
            self._send({"ask": question, "with": arguments})
        except BrokenPipeError:
            raise RunnerError(self._why_silent()) from None
        return self._answer()

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        limit = self.timer(PATIENCE, self.process.kill)
        limit.start()
        line = self.process.stdout.readline()
        limit.cancel()
        if not line:
            raise RunnerError(self._why_silent())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RunnerError(reply["error"])
        return reply

    def _why_silent(self) -> str:
        status = self.process.wait()
        self.messages.seek(0)
        last = self.messages.read().strip().splitlines()[-1:]
        return " ".join([f"its process ended with status {status} (-9: out of memory, or out of time)", *last])

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.messages.close()


def race(
    entries: Sequence[Entry], rounds: int, *, warm_ups: int = 2, exact: bool = True, tell: Callable[[str], None]
) -> dict[Entry, Result]:
    """Time entries against each other, each once a round, and return the result of each.

    An entry whose outputs differ from those of the first with its task is not timed: by more than `TOLERANCE` in
    float32, in a lower precision by more than twice the first one's error against float32. Peers are other models and
    only have to give finite numbers.

    Args:
        entries: the contenders and their tasks; for each task a reference first.
        rounds: number of runs that are timed.
        warm_ups: number of runs before that are not, at least one.
        exact: whether to count peak memory, bytes saved and multiply-adds, which takes three more runs.
        tell: called with a line on the progress now and then.
    """
    results = {entry: Result() for entry in entries}
    expected: dict[Task, dict[str, Tensor]] = {}
    allowed: dict[Task, float] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runners = {entry: stack.enter_context(Runner(entry)) for entry in entries}

        def each(do: Callable[[Entry, Runner], None]) -> None:
            """Call `do` with each entry that has not failed so far."""
            for entry, runner in runners.items():
                if not results[entry].error:
                    try:
                        do(entry, runner)
                    except RunnerError as error:
                        results[entry].error = str(error)

        def prepare(entry: Entry, runner: Runner) -> None:
            tell(f"{entry.contender} starts on {entry.task.title}")
            runner.ready()
            check(entry, runner)
            for _ in range(warm_ups - 1):  # the check was the first
                runner.ask("round")

        def check(entry: Entry, runner: Runner) -> None:
            path, task = folder / "outputs.safetensors", entry.task
            runner.ask("check", path=str(path))
            outputs = load_file(path)
            if task not in expected:
                if task.dtype != "float32":
                    runner.ask("check in float32", path=str(path))
                expected[task] = load_file(path)
                allowed[task] = max(TOLERANCE, 2 * max(relative_errors(outputs, expected[task]).values()))
            complaint = _not_finite(outputs)
            if not complaint and entry.contender not in PEERS:
                complaint = compare(outputs, expected[task], allowed[task])
            if complaint:
                raise RunnerError(f"{complaint}, so it is not timed")

        def run(entry: Entry, runner: Runner) -> None:
            result, reply = results[entry], runner.ask("round")
            result.seconds.append(reply["seconds"])
            result.resident_bytes = max(result.resident_bytes, reply["resident_bytes"])

        def count(entry: Entry, runner: Runner) -> None:
            results[entry].counts = runner.ask("count")

        def measure_limit(entry: Entry, runner: Runner) -> None:
            if entry.contender == "fast":
                found = runner.ask("limit")
                results[entry].gemms, results[entry].limit = found["gemms"], found["products"]

        for runner in runners.values():
            runner.begin()
        each(prepare)
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            each(run)
        if exact:
            tell("counting, and matrix products alone")
            each(measure_limit)
            each(count)
    return results


def compare(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: float) -> str:
    """Return what is wrong with outputs whose relative error may be `allowed`, or an empty string."""
    if outputs.keys() != expected.keys():
        odd = sorted(outputs.keys() ^ expected.keys())
        return f"{odd[0]} is among its outputs or the expected ones, not both"
    errors = relative_errors(outputs, expected)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= allowed:
        return f"{worst} is off by {errors[worst]:.1e}, expected at most {allowed:.1e}"
    return ""


def relative_errors(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return, for each tensor, the norm of the difference over the norm of what is expected."""
    tiny = torch.finfo(torch.float32).tiny
    return {
        name: float(torch.linalg.vector_norm(outputs[name] - truth) / torch.linalg.vector_norm(truth).clamp(min=tiny))
        for name, truth in expected.items()
        if name in outputs
    }


def _not_finite(outputs: Mapping[str, Tensor]) -> str:
    return next((f"{name} is not finite" for name, tensor in outputs.items() if not tensor.isfinite().all()), "")

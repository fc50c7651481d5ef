"""Run the parts of a visit, each in a process of its own, within the time that is given, and keep what they find."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .records import read_records
from .summary import page

ROOT = Path(__file__).parents[2]
FORMAT = 1
RESTARTS = 10  # of a part, behind an item in which it died
WRITE_EVERY = 10.0  # seconds between two writings while parts run
LOG = 4000  # characters
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a visit: what one process does.

    Args:
        name: what it is called in the results.
        task: name and arguments of a task of `bench.gpu.part`.
        environment: variables that its process gets.
    """

    name: str
    task: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """Parts that run side by side; where times are taken it is one part.

    Args:
        seconds: share of the time: what earlier stages leave is divided in these proportions.
    """

    parts: tuple[Part, ...]
    seconds: float


@dataclasses.dataclass
class Found:
    """What a part has found so far.

    Args:
        status: `waiting`, `running`, `done`, `failed`, or `cut off` where its time was up.
        begun: number of items that were begun.
        item: the last of them.
        seconds: that it took, all its processes together.
        records: see `bench.gpu.records.Records`.
        log: the end of what its process printed.
        kept: records of earlier processes.
        deaths: number of processes that died.
    """

    name: str
    status: str = "waiting"
    begun: int = 0
    item: str = ""
    seconds: float = 0.0
    records: list[Record] = dataclasses.field(default_factory=list)
    log: str = ""
    kept: list[Record] = dataclasses.field(default_factory=list)
    deaths: int = 0

    def as_dict(self) -> Record:
        """Return what the results hold of it; a log only of what went wrong."""
        log = "" if self.status in ("done", "running") else self.log
        return {
            "name": self.name,
            "status": self.status,
            "seconds": self.seconds,
            "item": self.item,
            "records": self.records,
            "log": log,
        }


class Job:
    """The process of a part, with the files that it writes."""

    def __init__(self, part: Part, folder: Path, skip: int, dry_run: bool) -> None:
        self.records, self.log = folder / "records", folder / "log"
        folder.mkdir(exist_ok=True)
        path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.getenv("PYTHONPATH"))))
        dry = {"TRITON_INTERPRET": "1"} if dry_run else {}
        command = [sys.executable, "-m", "bench.gpu.part", *(["--dry-run"] if dry_run else [])]
        command += ["--skip", str(skip), str(self.records), *part.task]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, **dry, **dict(part.environment)},
                start_new_session=True,
            )

    def status(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self.process.poll()

    def kill(self) -> None:
        """End it, with all processes that it started, so that the GPU's memory is free again."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # where the driver hangs
            self.process.wait(5)


class Visit:
    """A visit to a machine.

    Args:
        stages: in the order in which they run.
        file: JSON file of the results; the page lies beside it.
        folder: for the files of the processes.
        minutes: that all of it may take.
        about: what else the results say of the visit.
        dry_run: whether a CPU passes for a GPU.
        start: starts the process of a part.
        clock: returns seconds.
        slots: number of processes that may run at the same time.
        tell: called with a line on the progress now and then.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        file: Path,
        folder: Path,
        minutes: float,
        *,
        about: Record | None = None,
        dry_run: bool = False,
        start: Callable[[Part, Path, int, bool], Any] = Job,
        clock: Callable[[], float] = time.monotonic,
        slots: int = 1,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.stages, self.file, self.folder = stages, file, folder
        self.start, self.clock, self.slots, self.tell = start, clock, slots, tell
        self.dry_run, self.about = dry_run, about or {}
        self.end = clock() + 60 * minutes
        self.began = self.written = clock()
        self.found = {part: Found(part.name) for stage in stages for part in stage.parts}
        self.jobs: dict[Part, tuple[Any, float]] = {}

    def run(self) -> Record:
        """Run all stages and return the results, which the file holds too."""
        try:
            for number, stage in enumerate(self.stages):
                left = self.end - self.clock()
                share = stage.seconds / sum(later.seconds for later in self.stages[number:])
                self._run(stage, self.clock() + left * share)
        finally:
            for part in list(self.jobs):
                self._cut_off(part)
            results = self._write()
        return results

    def results(self) -> Record:
        """Return what was found so far."""
        return {
            "format": FORMAT,
            **self.about,
            "dry_run": self.dry_run,
            "seconds": round(self.clock() - self.began, 1),
            "parts": [found.as_dict() for found in self.found.values()],
        }

    def _run(self, stage: Stage, deadline: float) -> None:
        waiting = list(stage.parts)
        while waiting or self.jobs:
            while waiting and len(self.jobs) < self.slots and self.clock() < deadline:
                self._begin(waiting.pop(0))
            if self.clock() >= deadline:
                for part in waiting:
                    self.found[part].status = "cut off"
                for part in list(self.jobs):
                    self._cut_off(part)
                break
            ended = [part for part, (job, _) in self.jobs.items() if job.status() is not None]
            for part in ended:
                self._end(part)
            if ended or self.clock() - self.written > WRITE_EVERY:
                self._write()
            if not ended:
                time.sleep(0.05)
        self._write()

    def _begin(self, part: Part) -> None:
        found = self.found[part]
        found.status, found.kept = "running", list(found.records)
        folder = self.folder / part.name.replace("/", " of ")
        self.jobs[part] = self.start(part, folder, found.begun, self.dry_run), self.clock()

    def _end(self, part: Part) -> None:
        """Note how the process of a part ended; where it died in an item, start another one behind that."""
        found, begun, status = self.found[part], self.found[part].begun, self.jobs[part][0].status()
        self._collect(part)
        if status == 0:
            found.status = "done"
        else:
            found.status, found.deaths = "failed", found.deaths + 1
            last = found.log.strip().rpartition("\n")[2]
            what = found.item or part.name
            error = f"the process ended with status {status}: {last}"
            found.records.append({"kind": "failure", "what": what, "error": error, "where": found.log[-1500:]})
            if found.begun > begun and found.deaths <= RESTARTS:
                self._begin(part)
                return
        self._tell(found)

    def _cut_off(self, part: Part) -> None:
        self.jobs[part][0].kill()
        self._collect(part)
        self.found[part].status = "cut off"
        self._tell(self.found[part])

    def _collect(self, part: Part) -> None:
        """Take over what the process of a part has written, and forget the process."""
        job, started = self.jobs.pop(part)
        found = self.found[part]
        begun = self._read(found, job)
        if begun:
            found.begun, found.item = found.begun + len(begun), begun[-1]
        found.seconds = round(found.seconds + self.clock() - started, 1)
        job.records.unlink(missing_ok=True)

    def _read(self, found: Found, job: Any) -> list[str]:
        """Read what a process has written so far, and return the items that it has begun."""
        records = read_records(job.records)
        found.records = found.kept + [record for record in records if record["kind"] != "begin"]
        found.log = job.log.read_text(errors="replace")[-LOG:] if job.log.exists() else ""
        return [record["what"] for record in records if record["kind"] == "begin"]

    def _tell(self, found: Found) -> None:
        bad = sum(record["kind"] == "failure" or not record.get("ok", True) for record in found.records)
        where = f" in {found.item}" if found.status != "done" and found.item else ""
        self.tell(
            f"{self.clock() - self.began:5.0f} s  {found.name}: {found.status}{where}, {len(found.records)} records"
            + (f", {bad} of them bad" if bad else "")
        )

    def _write(self) -> Record:
        """Write results and page, whole or not at all, and return the results."""
        self.written = self.clock()
        for part, (job, _) in self.jobs.items():
            self._read(self.found[part], job)
        results = self.results()
        for path, text in ((self.file, json.dumps(results, indent=1)), (self.file.with_suffix(".md"), page(results))):
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        return results

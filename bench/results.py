"""What a run of the bench suite found, as it is kept in `bench/runs/`: who, on what machine, how long, how much."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "runs"
FORMAT = 1
PACKAGES = ("torch", "triton", "mmmae", "transformers", "flash-attn", "xformers", "numpy", "pytest-benchmark")


@dataclasses.dataclass
class Measurement:
    """One contender in one case.

    Args:
        group: what the case is about: `op`, `training step`, `encoding`, or what is varied, such as `bands`.
        case: what was done, the same for all contenders of a comparison: `patch_embed, batch 8`.
        contender: who did it: `native`, `fast`, `reference, SDPA`.
        seconds: of each round; rounds of a case's contenders were interleaved. Empty where nothing was timed.
        baseline: whether others' ratios refer to it.
        dtype, device, backend: `float32`, `cpu`, and what served, such as `native` or `sdpa`.
        allocator: `own` as the contender's user would have it, `kept` where each process keeps freed memory.
        x: what is varied in the group, as a number.
        samples: in a batch.
        macs: multiply-adds of matrix products, counted; None where nobody counted.
        bytes: that have to move at least: inputs and outputs once.
        gemms: seconds that the matrix products of the fast model's linear layers take alone.
        limit: seconds that no implementation can beat on this machine, from speeds measured in the same run: of a model
            `gemms` and attention's products at the speed of a square one.
        peak_bytes: most bytes of tensors alive at once, with parameters and data.
        resident_bytes: the process's memory at its largest in a round.
        saved_bytes: kept from forward for backward.
        note: what a reader has to know.
    """

    group: str
    case: str
    contender: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    baseline: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    backend: str = ""
    allocator: str = "own"
    x: float | None = None
    samples: int | None = None
    macs: int | None = None
    bytes: int | None = None
    gemms: float | None = None
    limit: float | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    saved_bytes: int | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """Of the rounds, in seconds; NaN where nothing was timed."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def rates(self) -> dict[str, float]:
        """What is known of samples/s, GFLOP/s (two operations a multiply-add), GB/s and share of the limit."""
        amounts = {
            "samples/s": self.samples,
            "GFLOP/s": self.macs and 2 * self.macs / 1e9,
            "GB/s": self.bytes and self.bytes / 1e9,
            "share of limit": self.limit,
        }
        return {name: amount / self.median for name, amount in amounts.items() if amount is not None and self.seconds}


@dataclasses.dataclass
class Prediction:
    """The least time that a piece of work can take on a GPU that is not here: computed from counts, never measured.

    Args:
        gpu: `A100`, `H100`, `B200` or `MI300X`, see `bench.predictions.GPUS`.
        group, case, contender: as in `Measurement`.
        macs, bytes, launches: counted of the work, backward included where it is trained.
        seconds: the floor: of each launch its multiply-adds or its bytes at the published peak, whichever takes
            longer, and their sum.
        memory_share: of the floor, spent in launches that the memory bounds.
    """

    gpu: str
    group: str
    case: str
    contender: str
    macs: int
    bytes: int
    launches: int
    seconds: float
    memory_share: float


@dataclasses.dataclass
class Results:
    """A run.

    Args:
        date: when it ended, ISO 8601, UTC.
        commit: of the tree, with `+` where the tree had changes.
        machine: `name`, `cpu`, `cores`, `threads`, `memory_gb`, `gpu`, `system`.
        versions: of packages.
        options: of the command line.
        limits: measured in the run: `copy_gb_s`, `gemm_gflop_s`.
        measurements: in the order in which they were taken.
        profiles: by preset, `mmmae.profile(preset).to_dict()`.
        predictions: for GPUs that are not here; counted, not measured.
    """

    date: str
    commit: str
    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    limits: dict[str, float]
    measurements: list[Measurement]
    profiles: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    predictions: list[Prediction] = dataclasses.field(default_factory=list)

    def cases(self) -> dict[tuple[str, str, str], list[Measurement]]:
        """Measurements that are to be compared, by group, case and allocator; the baseline is among them."""
        return by_case(self.measurements)

    def to_json(self) -> str:
        """As a JSON object."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is no such object.
        """
        try:
            values = json.loads(text)
            found = values.pop("format")
            if found != FORMAT:
                raise ValueError(f"format {found} is not {FORMAT}")
            measurements = [Measurement(**measurement) for measurement in values.pop("measurements")]
            predictions = [Prediction(**prediction) for prediction in values.pop("predictions")]
            return cls(measurements=measurements, predictions=predictions, **values)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"no results of the bench suite: {error!r}") from error

    @property
    def name(self) -> str:
        """Of its files: the date and the machine."""
        stamp = re.sub(r"[-:]", "", self.date)[:15].replace("T", "-")
        return f"{stamp}-{self.machine['name']}"


def by_case(measurements: Iterable[Measurement]) -> dict[tuple[str, str, str], list[Measurement]]:
    """Those that are to be compared, by group, case and allocator."""
    cases: dict[tuple[str, str, str], list[Measurement]] = {}
    for measurement in measurements:
        cases.setdefault((measurement.group, measurement.case, measurement.allocator), []).append(measurement)
    return cases


def ratio(measurement: Measurement, baseline: Measurement) -> float:
    """The baseline's time over a contender's, of medians: above 1 the contender is faster."""
    return baseline.median / measurement.median


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The power of x that y grows with: the slope of a line through the logs by least squares; NaN of one x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    centre = [sum(values) / len(logs) for values in zip(*logs, strict=True)]
    squares = sum((x - centre[0]) ** 2 for x, _ in logs)
    return sum((x - centre[0]) * (y - centre[1]) for x, y in logs) / squares if squares else math.nan


def today() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def commit() -> str:
    """Of the tree that the suite lies in, with `+` after changes; empty outside of a repository."""
    root = Path(__file__).parents[1]
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changes else "")


def versions() -> dict[str, str]:
    """Of Python and of what is installed of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the times depend on. The name is made of processor and cores, so that it names nobody's host."""
    cpu = _cpu()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*|\(avx.*", "", gpu or cpu)
    name = "-".join(re.findall(r"[A-Za-z0-9.]+", words)).lower() or "machine"
    return {
        "name": f"{name}-{cores}-cores",
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpu": gpu,
        "system": platform.system(),
    }


def _cpu() -> str:
    """The processor's own name with the vector extensions that kernels ask for."""
    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        found = re.search(r"model name\s*: (.*)", text)
        name = found[1].strip() if found else name
        known = re.search(r"flags\s*: (.*)", text)
        flags = ", ".join(flag for flag in ("avx2", "avx512f", "amx_bf16") if known and flag in known[1].split())
    return f"{name} ({flags})" if flags else name


def _memory_gb() -> float:
    if not hasattr(os, "sysconf"):
        return float("nan")
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)

"""The results of a run of the bench suite, as its JSON file in `bench/runs/` holds them."""

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
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "runs"
FORMAT = 1
PACKAGES = ("torch", "triton", "mmmae", "transformers", "flash-attn", "xformers", "numpy", "pytest-benchmark")


@dataclasses.dataclass
class Measurement:
    """The times of one contender in one case, and what was counted of it; None where it was not.

    Args:
        group: kind of the case: `op`, `training step`, `encoding`, or what is varied, such as `bands`.
        case: the work, the same for all contenders of a comparison: `patch_embed, batch 8`.
        contender: the implementation: `native`, `fast`, `reference, SDPA`.
        seconds: duration of each round; rounds of a case's contenders were interleaved. Empty where nothing was timed.
        baseline: whether the ratios of the others refer to this one.
        dtype, device, backend: `float32`, `cpu`, and the implementation of an op, such as `native` or `sdpa`.
        allocator: `own` as the contender's user would have it, `kept` where each process keeps freed memory.
        x: the number that is varied in the group.
        samples: number in a batch.
        macs: multiply-adds of matrix products.
        bytes: least number that has to move: inputs and outputs once.
        gemms: seconds that the matrix products of the fast model's linear layers take alone.
        limit: seconds that no implementation can beat on this machine, from speeds measured in the same run: for a
            model, `gemms` and attention's products at the speed of a square one.
        peak_bytes: most bytes of tensors alive at once, with parameters and data.
        resident_bytes: largest memory of the process in a round.
        saved_bytes: bytes kept from forward for backward.
        note: a remark for the reader.
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
        """Median of the rounds in seconds; NaN where nothing was timed."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def rates(self) -> dict[str, float]:
        """Samples/s, GFLOP/s (two operations a multiply-add), GB/s and share of the limit, as far as they are known."""
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
        gpu: a name in `bench.predictions.GPUS`.
        group, case, contender: as in `Measurement`.
        macs, bytes, launches: counts of the work, backward included where there is one.
        seconds: the floor: the sum over operators of the multiply-adds or the bytes at the published peak, whichever
            take longer.
        memory_share: share of the floor in operators that memory bounds.
        casts: launches that only convert a floating point type.
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
    casts: int = 0


@dataclasses.dataclass
class Results:
    """The results of a run.

    Args:
        date: end of the run, ISO 8601, UTC.
        commit: commit of the tree, with `+` where the tree had changes.
        machine: `name`, `cpu`, `cores`, `threads`, `memory_gb`, `gpu`, `system`.
        versions: installed version of each package.
        options: options of the command line.
        limits: speeds measured in the run: `copy_gb_s`, `gemm_gflop_s`.
        measurements: in the order in which they were taken.
        profiles: `mmmae.profile(preset).to_dict()` by preset.
        predictions: floors on GPUs that are not here; counted, not measured.
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
        """Return the measurements by group, case and allocator: those of one case are to be compared."""
        return by_case(self.measurements)

    def to_json(self) -> str:
        """Return the results as a JSON object."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read what `to_json` returned.

        Raises:
            ValueError: if the text is something else.
        """
        try:
            values = json.loads(text)
            found = values.pop("format")
            if found != FORMAT:
                raise ValueError(f"format is {found}, expected {FORMAT}")
            measurements = [Measurement(**measurement) for measurement in values.pop("measurements")]
            predictions = [Prediction(**prediction) for prediction in values.pop("predictions")]
            return cls(measurements=measurements, predictions=predictions, **values)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a results file of the bench suite: {error!r}") from error

    @property
    def name(self) -> str:
        """Name of the run's files: the date and the machine."""
        stamp = re.sub(r"[-:]", "", self.date)[:15].replace("T", "-")
        return f"{stamp}-{self.machine['name']}"


Record = Callable[[Measurement], None]


def by_case(measurements: Iterable[Measurement]) -> dict[tuple[str, str, str], list[Measurement]]:
    """Return measurements by group, case and allocator: those of one case are to be compared."""
    cases: dict[tuple[str, str, str], list[Measurement]] = {}
    for measurement in measurements:
        cases.setdefault((measurement.group, measurement.case, measurement.allocator), []).append(measurement)
    return cases


def ratio(measurement: Measurement, baseline: Measurement) -> float:
    """Return the baseline's median time over a contender's: above 1 the contender is faster."""
    return baseline.median / measurement.median


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return the power of x that y grows with: the least-squares slope of the logarithms, or NaN with a single x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    centre = [sum(values) / len(logs) for values in zip(*logs, strict=True)]
    squares = sum((x - centre[0]) ** 2 for x, _ in logs)
    return sum((x - centre[0]) * (y - centre[1]) for x, y in logs) / squares if squares else math.nan


def today() -> str:
    """Return the time as ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def commit() -> str:
    """Return the tree's commit, with `+` where something but kept runs has changed; empty outside of a repository."""
    root = Path(__file__).parents[1]
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", ".", ":!bench/runs"])
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changes else "")


def versions() -> dict[str, str]:
    """Return the version of Python and of each of `PACKAGES` that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Describe the machine. Its name is made of processor and cores, so that it does not give the host's."""
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
    """Return the processor's name with those of its vector extensions that kernels ask for."""
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

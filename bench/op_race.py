"""A comparison of an op's variants in this process: checked to be equal, then timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench.device_time import copies_for, followed, is_queued, replayed
from bench.limits import copy_speed, gemm_speed, gemms_of, seconds_alone
from bench.op_cases import CASES
from bench.op_work import BACKENDS, OpWork, Place, Run, compiled
from bench.options import Options
from bench.results import Measurement
from mmmae.cost.launches import flop_counter

TOLERANCE = 1e-5  # float32: sums of up to 1568 rows in another order
REPEAT = 10  # runs on a GPU that are started without waiting, where they can't be captured


class OpRace:
    """The variants of an op, with their tensors; the first is the baseline, which the others must equal.

    In a lower precision than float32 a variant's error against float32 may be twice the baseline's.

    Args:
        op: one of `bench.op_cases.CASES`.
        options: give batch, device and type, and whether the baseline is compiled too (`full`).
        dtype: type of the tensors; None means that of the options.
    """

    def __init__(self, op: str, options: Options, dtype: str | None = None) -> None:
        self.op = op
        setup, _ = CASES[op]
        self.batch = options.batch or (2 if options.quick else 8)
        self.device, self.dtype = options.device, dtype or options.dtype
        type_: torch.dtype = getattr(torch, self.dtype)
        self.work: OpWork = self._set_up(setup, Place(options.device, type_))
        self.variants: dict[str, Run] = {name: run for name, run in self.work.variants.items() if serves(name, run)}
        if self.device != "cpu":
            self.variants.pop("native", None)  # serves on this machine, but not there
        first = next(iter(self.variants))
        self.failures: dict[str, str] = {}
        if options.full:
            self._compile(first)
        self.expected, self.allowed = self.variants[first](), TOLERANCE
        if type_ != torch.float32:
            truth = self._set_up(setup, Place(options.device, torch.float32, type_)).variants[first]()
            self.allowed = 2 * max(relative_error(ours, true) for ours, true in zip(self.expected, truth, strict=True))
            self.expected = truth
        self.macs = self._count_macs(first)
        copies = copies_for(self.work.bytes) if is_queued(self.device) else 1
        self.copies = [self._set_up(setup, Place(options.device, type_)).variants for _ in range(copies - 1)]
        self.seconds: dict[str, list[float]] = {}
        self.notes: dict[str, str] = {}
        self._limit: float | None = None

    def _set_up(self, setup: Callable[[int, Place], OpWork], place: Place) -> OpWork:
        torch.manual_seed(0)
        return setup(self.batch, place)

    def _compile(self, variant: str) -> None:
        """Add the variant compiled, and run it once so that compiling is not timed."""
        name = f"{variant}, compiled"
        self.variants[name] = compiled(self.variants[variant])
        try:
            self.variants[name]()
        except Exception as error:  # shown with the variant's name
            self.failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def _count_macs(self, variant: str) -> int:
        with flop_counter() as counter:
            self.variants[variant]()
        return int(counter.get_total_flops()) // 2

    def complaint(self, variant: str) -> str:
        """Return what is wrong with a variant's outputs and gradients, or an empty string."""
        if variant in self.failures:
            return self.failures[variant]
        for index, (ours, theirs) in enumerate(zip(self.variants[variant](), self.expected, strict=True)):
            error = relative_error(ours, theirs)
            if not error <= self.allowed:
                return f"output {index} is off by {error:.1e}, expected at most {self.allowed:.1e}, so it is not timed"
        return ""

    def run(self, rounds: int) -> None:
        """Time the variants, one run of each a round, so that a slow moment of the machine hits all of them.

        On a GPU each variant is captured as a graph, and takes tensors in turn that the cache does not hold.
        """
        right = {variant: run for variant, run in self.variants.items() if not self.complaint(variant)}
        if is_queued(self.device):
            runs = {variant: [run, *self._copies_of(variant)] for variant, run in right.items()}
            self.seconds, refused = replayed(runs, rounds)
            self.seconds |= followed({variant: right[variant] for variant in refused}, rounds, REPEAT)
            self.notes = {variant: f"with the host's time: no graph: {reason}" for variant, reason in refused.items()}
            return
        self.seconds = {variant: [] for variant in right}
        for _ in range(rounds):
            for variant, run in right.items():
                start = time.perf_counter()
                run()
                self.seconds[variant].append(time.perf_counter() - start)

    def _copies_of(self, variant: str) -> list[Run]:
        return [variants[variant] for variants in self.copies if variant in variants]

    def measurement(self, variant: str, speeds: Mapping[str, float]) -> Measurement:
        """Return the times of a variant, beside the limit that this machine sets; `speeds` is of `measure_speeds`."""
        return Measurement(
            group="op",
            case=f"{self.op}, batch {self.batch}" + ("" if self.dtype == "float32" else f", {self.dtype}"),
            contender=variant,
            seconds=self.seconds[variant],
            baseline=variant == next(iter(self.variants)),
            dtype=self.dtype,
            device=self.device,
            backend=variant,
            samples=self.batch,
            macs=self.macs or None,
            bytes=self.work.bytes,
            limit=self.limit(speeds),
            note=self.notes.get(variant, ""),
        )

    def limit(self, speeds: Mapping[str, float]) -> float:
        """Return the seconds that the bytes take at a copy's speed, or the matrix products alone, if they take longer.

        Attention's products are not single calls: they are counted at the speed of a square product.
        """
        if self._limit is None:
            products = gemms_of(next(iter(self.variants.values())))
            alone = seconds_alone(products, self.device, self.dtype) if products else 2 * self.macs / speeds["gemm"]
            self._limit = max(self.work.bytes / speeds["copy"], alone)
        return self._limit


def serves(variant: str, run: Run) -> bool:
    """Return whether a variant takes this work, if it is a backend: not each takes every type."""
    try:
        if variant in BACKENDS:
            run()
    except ValueError as error:
        if "does not support this call" in str(error):
            return False
        raise
    return True


def measure_speeds(device: str, dtype: str) -> dict[str, float]:
    """Return the bytes a second of a copy and the operations a second of a matrix product, `copy` and `gemm`."""
    return {"copy": copy_speed(device), "gemm": gemm_speed(device, dtype)}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference over the norm of `theirs`."""
    difference = torch.linalg.vector_norm((ours - theirs).double())
    return float(difference / torch.linalg.vector_norm(theirs.double()).clamp(min=torch.finfo(torch.float32).tiny))

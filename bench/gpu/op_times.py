"""Times of each op on a GPU, ours against PyTorch's: on the device alone, and with the host."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from bench.device_time import followed
from bench.limits import gemm_speed
from bench.op_cases import CASES
from bench.op_race import OpRace, measure_speeds
from bench.options import Options
from mmmae_kernels import use_backend

from .profiling import kernels_of
from .records import Records
from .setting import Setting
from .summary import COPY, PRODUCT

ROUNDS, REPEAT = 9, 20


def op_times(records: Records, setting: Setting, batch: str) -> None:
    """Time every op in bfloat16, forward and backward, with tensors that the cache does not hold."""
    speeds: dict[str, float] = {}
    records.attempt("peaks", peaks, records, setting, speeds, needed=True)
    for op in setting.ops(CASES):
        records.attempt(f"times of {op}, batch {batch}", _times, records, setting, op, int(batch), speeds)


def peaks(records: Records, setting: Setting, speeds: dict[str, float]) -> None:
    """Measure and record the speed of a copy and of products; set those of `bench.op_race.measure_speeds`."""
    device = setting.device
    speeds |= measure_speeds(device, "bfloat16")
    found = {COPY: speeds["copy"] / 1e9, PRODUCT: speeds["gemm"] / 1e12}
    before = torch.get_float32_matmul_precision()
    for name, precision in (("tf32", "high"), ("float32", "highest")):
        torch.set_float32_matmul_precision(precision)
        found[f"{name}, TFLOP/s"] = gemm_speed(device, "float32") / 1e12
    torch.set_float32_matmul_precision(before)
    records.add("fact", name="peaks", value={name: float(f"{value:.4g}") for name, value in found.items()})


def _times(records: Records, setting: Setting, op: str, batch: int, speeds: dict[str, float]) -> None:
    torch.cuda.empty_cache()
    options = Options(
        *(True, setting.dry_run, False, None),
        batch=setting.batch(batch),
        device=setting.device,
        dtype="bfloat16",
        only=op,
        results=Path(),
    )
    with use_backend(setting.quick):
        race = OpRace(op, options)
    baseline = next(iter(race.variants))
    race.variants = {name: race.variants[name] for name in (baseline, *setting.ours(race.variants, op))}
    race.run(setting.rounds(ROUNDS))
    eager = followed({name: race.variants[name] for name in race.seconds}, setting.rounds(5), setting.rounds(REPEAT))
    for variant in race.variants:
        if variant not in race.seconds:
            records.add("failure", what=f"times of {op}: {variant}", error=race.complaint(variant))
            continue
        measured = dataclasses.asdict(race.measurement(variant, speeds))
        records.add("measurement", **measured, with_host=statistics.median(eager[variant]))
    if "attention" in op:
        run: Callable[[], object] = race.variants[baseline]
        records.add("fact", name=f"kernels of {op} in PyTorch", value=[row["kernel"] for row in kernels_of(run)[:6]])

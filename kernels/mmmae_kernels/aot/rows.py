"""One row of the report: a kernel compiled for one architecture, type and configuration."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from triton.runtime.cache import get_cache_manager

from ..gpu.compilation import compile_kernel
from ..gpu.config import SHARED_MEMORY, Config, Launch
from ..gpu.executors import execute_by
from . import assembly
from .assembly import load_bytes, matrix_instructions, registers_and_spills, scalar_spills
from .cases import CASES, DTYPES
from .costs import cost
from .occupancy import occupancy, resident_programs, waves

Row = dict[str, Any]
HEADS: tuple[str, ...] = (
    "op",
    "kernel",
    "target",
    "dtype",
    "config",
    "registers",
    "spills",
    "scalar_spills",
    "shared",
    "matrix_instructions",
)
HEADS += ("load_bytes", "bytes", "flops", "programs", "resident", "occupancy", "waves", "note")

_READERS = hashlib.sha256(Path(assembly.__file__).read_bytes()).hexdigest()[:16]
GEMMS = {"_patch_embed_forward", "_patch_embed_weight_gradient", "_patch_embed_volume_gradient", "_patch_l2_forward"}


class Recorder:
    """An executor that runs nothing and keeps the launches that compile to different kernels."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.launches: dict[tuple[Any, ...], tuple[Launch, Config]] = {}

    def __call__(self, launch: Launch) -> Config:
        types = tuple(_specialised(name, value) for name, value in launch.arguments.items())
        for config in launch.configs:
            constants = (*config.constants.items(), config.warps, config.stages)
            self.launches.setdefault((launch.kernel.fn.__name__, types, constants), (launch, config))
        return launch.configs[0]


def compile_rows(task: tuple[str, str, tuple[str, ...]]) -> list[Row]:
    """Return the rows of one architecture and dtype, for some ops."""
    target, dtype, ops = task
    torch.set_num_threads(1)
    return [row for op in ops for row in _rows_of(op, target, dtype)]


def _rows_of(op: str, target: str, dtype: str) -> Iterator[Row]:
    recorder = Recorder(target)
    with execute_by(recorder):
        CASES[op](DTYPES[dtype])
    for launch, config in recorder.launches.values():
        row = {"op": op, "dtype": dtype, **row_of(launch, config, target)}
        yield row | {"note": _note(launch.kernel.fn.__name__, row, launch)}


def row_of(launch: Launch, config: Config, target: str) -> Row:
    """Return what a launch with this config needs on an architecture, for which its kernel is compiled."""
    compiled = compile_kernel(launch.kernel, launch.arguments, config, target)
    found, shared = _findings(compiled), compiled.metadata.shared
    flops, moved = cost(launch)
    programs = math.prod(launch.grid(config.constants))
    resident = resident_programs(target, found["registers"], shared, config.warps)
    return {
        "kernel": launch.kernel.fn.__name__.lstrip("_"),
        "target": target,
        "config": _text(launch, config),
        **found,
        "shared": shared,
        "bytes": moved,
        "flops": flops,
        "programs": programs,
        "resident": resident,
        "occupancy": round(occupancy(target, resident, config.warps), 3),
        "waves": round(waves(target, resident, programs), 2),
    }


def _findings(compiled: Any) -> dict[str, int]:
    """Return what `assembly` reads from a kernel's code; kept beside the code in Triton's cache, by how it is read."""
    folder = get_cache_manager(compiled.hash)
    name = f"aot-{_READERS}.json"
    stored = folder.get_file(name)
    if stored is not None:
        return dict(json.loads(Path(stored).read_text()))
    registers, spills = registers_and_spills(compiled.asm)
    found = {
        "registers": registers,
        "spills": spills,
        "scalar_spills": scalar_spills(compiled.asm),
        "matrix_instructions": matrix_instructions(compiled.asm),
        "load_bytes": load_bytes(compiled.asm),
    }
    folder.put(json.dumps(found), name, binary=False)
    return found


def faults_of(row: Row) -> list[str]:
    """Return the faults of one compiled kernel; narrow loads that `note` explains are none."""
    name = f"{row['kernel']} ({row['config']}) for {row['target']} in {row['dtype']}"
    limit = SHARED_MEMORY[row["target"]]
    faults = []
    if row["spills"]:
        faults.append(f"{name} spills {row['spills']} bytes")
    if row["scalar_spills"]:
        faults.append(f"{name} spills {row['scalar_spills']} scalar registers")
    if row["shared"] > limit:
        faults.append(f"{name} asks for {row['shared']} bytes of shared memory, the limit is {limit}")
    if f"_{row['kernel']}" in GEMMS and not row["matrix_instructions"] and has_matrix_instruction(row):
        faults.append(f"{name} has no matrix instructions")
    if row["load_bytes"] < 16 and not row["note"]:
        faults.append(f"{name} loads its data in pieces of {row['load_bytes']} bytes")
    return faults


def has_matrix_instruction(row: Row) -> bool:
    """Return whether the architecture has matrix instructions for this dtype: RDNA has none for float32."""
    return not (row["target"].startswith("gfx11") and row["dtype"] == "fp32")


def _note(kernel: str, row: Row, launch: Launch) -> str:
    """Return why a kernel has to load narrowly, or an empty string."""
    if row["load_bytes"] >= 16:
        return ""
    if kernel in ("_random_masking", "_noise"):
        return "loads a seed alone"
    if kernel == "_weighted_mean":
        return "one program, a few numbers a thread"
    if kernel == "_patch_embed_weight_gradient" and row["target"] in ("sm90", "sm100") and row["dtype"] == "fp32":
        return "wgmma and tcgen05 take tf32 contiguous along the sum, here rows: transposed on the way"
    volume = launch.arguments.get("volume_ptr")
    if volume is not None and volume.dtype.itemsize < 2:
        return "8 neighbouring elements are 8 bytes of a volume of bytes"
    line = launch.arguments.get("PW", 16) * DTYPES[row["dtype"]].itemsize
    return f"lines of {line} bytes" if line % 16 else ""


def _text(launch: Launch, config: Config) -> str:
    """Return the configuration and what else distinguishes this kernel from others of its name."""
    parts = [f"{name.removeprefix('BLOCK_')}{value}" for name, value in config.constants.items()]
    parts += [f"w{config.warps}", f"s{config.stages}"]
    volume = launch.arguments.get("volume_ptr")
    if volume is not None:
        parts.append(str(volume.dtype).removeprefix("torch."))
    if launch.kernel.fn.__name__ in GEMMS:
        parts.append(launch.arguments["PRECISION"])
    parts += [f"no {name.removesuffix('_ptr')}" for name, value in launch.arguments.items() if value is None]
    if launch.arguments.get("NORMALIZE"):
        parts.append("normalize")
    return " ".join(parts)


def _specialised(name: str, value: Any) -> tuple[Any, ...]:
    """Return the properties of an argument that a compiled kernel depends on."""
    if isinstance(value, torch.Tensor):
        return name, value.dtype
    if isinstance(value, int) and not isinstance(value, bool) and not name.isupper():
        return name, value == 1, value % 16 == 0
    return name, value

"""What a machine is, and which implementation it would choose for each op."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bench.results
import mmmae_kernels
from mmmae_kernels.attention.call import Call, target_of
from mmmae_kernels.attention.op import BACKENDS, explain_call

from .records import Records
from .setting import Setting

QUERIES = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
HEAD_WIDTHS = (64, 80)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SANITIZER = "compute-sanitizer"


def environment(records: Records, setting: Setting) -> None:
    """Record machine, versions, variables, and what serves each op and attention."""
    facts: dict[str, Callable[[], object]] = {
        "machine": bench.results.machine,
        "commit": bench.results.commit,
        "versions": _versions,
        "GPU": lambda: _gpu(setting),
        "nvidia-smi": _nvidia_smi,
        "variables": lambda: {name: value for name, value in os.environ.items() if name.startswith(("MMMAE", "TORCH"))},
        "stand-in for huggingface_hub": lambda: getattr(sys.modules["huggingface_hub"], "__file__", None) is None,
        SANITIZER: lambda: sanitizer_path() or "not found",
        "ops": mmmae_kernels.explain,
        "attention": lambda: _attention(setting),
    }
    for name, fact in facts.items():
        records.attempt(name, _note, records, name, fact)


def _note(records: Records, name: str, fact: Callable[[], object]) -> None:
    records.add("fact", name=name, value=fact())


def _versions() -> dict[str, Any]:
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {**bench.results.versions(), "cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": cudnn}


def _gpu(setting: Setting) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gb": round(found.total_memory / 1e9, 1),
        "l2_cache_mb": round(getattr(found, "L2_cache_size", 0) / 1e6, 1),
        "target": target_of(setting.device, None),
    }


def _nvidia_smi() -> dict[str, str] | str:
    if shutil.which("nvidia-smi") is None:
        return "not found"
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        return (done.stdout + done.stderr).strip()
    return dict(zip(QUERIES, done.stdout.splitlines()[0].split(", "), strict=False))


def _attention(setting: Setting) -> dict[str, dict[str, str]]:
    """Return for each kind of call what each backend answers, the chosen one first."""
    target = target_of(setting.device, None)
    answers: dict[str, dict[str, str]] = {}
    for dtype in DTYPES:
        for width in HEAD_WIDTHS:
            for masked in (False, True):
                reasons = explain_call(Call(target, dtype, width, masked), here=True)
                chosen = next(backend for backend in BACKENDS if reasons[backend] is None)
                call = f"{dtype}, head width {width}{', with key_present' * masked}".removeprefix("torch.")
                answers[call] = {"chosen": chosen, **{name: reason or "serves" for name, reason in reasons.items()}}
    return answers


def sanitizer_path() -> str | None:
    """Return the path of compute-sanitizer: on the PATH, or in a folder of CUDA; None if it is not there."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) for home in homes if home] + sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    folders += sorted(Path("/opt/nvidia").glob("*"))
    places = [folder / inner for folder in folders for inner in ("bin", "compute-sanitizer", "extras/CUPTI/bin", ".")]
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=os.pathsep.join(map(str, places)))

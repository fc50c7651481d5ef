"""A contender in a process of its own: `python -m bench.worker`, driven by `bench.race` through its pipes.

A line in is a JSON object, and so is its answer. The first names contender and task; for the others see `ANSWERS`.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import mmmae
from bench.contenders import COMPILED, Task, Work
from bench.device_time import is_queued, once
from bench.limits import gemm_speed, gemms_of, macs_of, peak_bytes, seconds_alone
from mmmae.cost.launches import flop_counter
from mmmae_kernels import use_backend

SAMPLED = 4096  # numbers of a tensor that are compared


def main() -> None:
    """Answer requests until the pipe closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    warnings.simplefilter("ignore")
    work: Work | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if work is None:
                if request["kept"]:
                    mmmae.tune_cpu()
                work = Work(request["contender"], Task(**request["task"]))
                reply: dict[str, Any] = {}
            else:
                reply = ANSWERS[request["ask"]](work, **request.get("with", {}))
        except Exception as error:  # the parent shows it
            reply = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(reply), file=replies, flush=True)


def check(work: Work, path: str) -> dict[str, Any]:
    """Write a sample of every tensor that the work returns."""
    save_file(sample(work.run()), path)
    return {}


def check_float32(work: Work, path: str) -> dict[str, Any]:
    """Write the same of the work done in float32."""
    save_file(sample(work.run(dtype="float32")), path)
    return {}


def sample(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return numbers evenly spread over each tensor."""
    parts = {}
    for name, tensor in outputs.items():
        flat = tensor.detach().flatten()
        parts[name] = flat[:: -(-flat.numel() // SAMPLED)].float().cpu().clone()
    return parts


def run_round(work: Work) -> dict[str, Any]:
    """Do the work once and return the seconds it took and the largest memory of the process meanwhile."""
    device = work.task.device
    gc.collect()
    _forget_peak(device)
    return {"seconds": _seconds(work), "resident_bytes": _resident_peak(device)}


def _seconds(work: Work) -> float:
    if is_queued(work.task.device):
        return once(work.run)
    start = time.perf_counter()
    work.run()
    return time.perf_counter() - start


def count(work: Work) -> dict[str, Any]:
    """Count the most bytes of tensors alive at once, bytes saved for backward, and multiply-adds."""
    if work.contender in COMPILED:  # neither counter sees into compiled code
        return {"peak_bytes": work.held_bytes + peak_bytes(work.run, work.task.device)}
    storages: dict[int, int] = {}  # address and bytes; what is saved stays until the forward pass has ended

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter = flop_counter()
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        beyond = peak_bytes(work.run, work.task.device)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in work.parameters.values()}
    saved = sum(size for pointer, size in storages.items() if pointer not in parameters)
    return {
        "peak_bytes": work.held_bytes + beyond,
        "saved_bytes": saved or None,
        "macs": counter.get_total_flops() // 2,
    }


def limit(work: Work) -> dict[str, Any]:
    """Measure the seconds that the products of the linear layers take alone, and with attention's products."""
    device, dtype = work.task.device, work.task.dtype
    with use_backend("eager"):
        shapes = gemms_of(work.run)
    with flop_counter() as counter:
        work.run()
    seconds = seconds_alone(shapes, device, dtype)
    rest = counter.get_total_flops() - 2 * macs_of(shapes)
    return {"gemms": seconds, "products": seconds + rest / gemm_speed(device, dtype)}


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _resident_peak(device: str) -> int:
    """Return the peak since `_forget_peak`, or since the process began where the system can't reset it."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


ANSWERS: dict[str, Callable[..., dict[str, Any]]] = {
    "check": check,
    "check in float32": check_float32,
    "round": run_round,
    "count": count,
    "limit": limit,
}

if __name__ == "__main__":
    main()

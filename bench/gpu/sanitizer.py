"""compute-sanitizer over small cases of every op: accesses out of bounds, and races in shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from mmmae_kernels import use_backend
from tests.cases.case import TYPES, results
from tests.cases.ops import CASES

from .environment import SANITIZER, sanitizer_path
from .records import Records, read_records
from .setting import Setting

STATUS = 86  # of a run in which the tool has found something


def sanitizer(records: Records, setting: Setting, tool: str, types: str) -> None:
    """Run the small cases under a tool, or say that there is none."""
    path = sanitizer_path()
    if path is None:
        records.add("skipped", what=SANITIZER, reason="it is neither on the PATH nor in a folder of CUDA")
        return
    what = f"{tool}, small cases in {types}"
    records.attempt(what, _run, records, setting, path, what, tool, types)


def _run(records: Records, setting: Setting, path: str, what: str, tool: str, types: str) -> None:
    # Memory that PyTorch's cache gives out has neighbours that may be accessed: memcheck would see no error.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder) / "records"
        dry = ["--dry-run"] if setting.dry_run else []
        done = subprocess.run(
            [
                *(path, "--tool", tool, "--error-exitcode", str(STATUS), "--print-limit", "20"),
                *(sys.executable, "-m", "bench.gpu.part", *dry, str(inner), "sanitized", types),
            ],
            env={**os.environ, **uncached},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        ran = [record for record in read_records(inner) if record["kind"] == "begin"]
    if not ran or "SUMMARY:" not in done.stdout:  # a driver or a virtual machine may refuse the tool
        records.add("skipped", what=what, reason=f"the tool did not run: {done.stdout.strip()[-300:]}")
        return
    records.add(
        "check", what=what, op=SANITIZER, backend=tool, types=types, **verdict(done.returncode, done.stdout, len(ran))
    )


def verdict(status: int, printed: str, ran: int) -> dict[str, object]:
    """Return what a run under a tool says: the number of errors, and the first lines about them."""
    errors = max(map(int, re.findall(r"SUMMARY:.*?(\d+) errors?", printed)), default=0)
    return {
        "error": float(errors),
        "allowed": 0.0,
        "result": 0,
        "ok": status == 0 and errors == 0,
        "cases": ran,
        "status": status,
        "printed": [line.lstrip("= ") for line in printed.splitlines() if line.startswith("=========")][:40],
    }


def sanitized(records: Records, setting: Setting, types: str) -> None:
    """Run the smallest cases of each op, forward and backward, and compare nothing."""
    for case in {case.op: case for case in reversed(CASES) if case.small}.values():
        given = {
            name: None if tensor is None else tensor.to(setting.device)
            for name, tensor in case.inputs(TYPES[types]).items()
        }
        records.add("begin", what=str(case))
        with use_backend(setting.backend(TYPES[types].dtype)):
            results(case, case.call, given, TYPES[types])

"""Compile every kernel for every architecture and report its resources: `python -m mmmae_kernels.aot`.

Exits with 1 where a kernel spills registers, asks for more shared memory than its target has, multiplies matrices
without matrix instructions, or loads data in pieces below 16 bytes for no reason that the table names. What is compiled
and read once stays in Triton's cache, under a key that the kernels' sources are part of.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from ..gpu.config import SHARED_MEMORY
from .cases import CASES, DTYPES
from .rows import HEADS, Row, compile_rows, faults_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mmmae_kernels.aot", description=__doc__)
    parser.add_argument("--op", choices=CASES, action="append", help="only this op (may be given again)")
    parser.add_argument("--target", choices=SHARED_MEMORY, action="append", help="only this architecture")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only this type")
    parser.add_argument("--json", action="store_true", help="print one list of rows instead of a table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: nothing can be compiled")
    ops = tuple(options.op or CASES)
    tasks = [(target, dtype, ops) for target in options.target or SHARED_MEMORY for dtype in options.dtype or DTYPES]
    rows: list[Row] = []
    for (target, dtype, _), of_task in zip(tasks, _compile(tasks), strict=True):
        print(f"{target} {dtype}: {len(of_task)} kernels compiled", file=sys.stderr, flush=True)
        rows += of_task
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    faults = [fault for row in rows for fault in faults_of(row)]
    for fault in faults:
        print(f"aot: {fault}", file=sys.stderr)
    print(f"aot: {len(rows)} kernels, {len(faults)} faults", file=sys.stderr)
    return 1 if faults else 0


def table(rows: Sequence[Row]) -> str:
    """Format all rows, one line each, under their heads."""
    cells = [HEADS, *([str(row[head]) for head in HEADS] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _compile(tasks: Sequence[tuple[str, str, tuple[str, ...]]]) -> Iterator[list[Row]]:
    processes = min(len(tasks), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_rows, tasks)


if __name__ == "__main__":
    sys.exit(main())

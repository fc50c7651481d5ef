"""A part of a visit in a process of its own: `python -m bench.gpu.part RECORDS TASK [ARGUMENT ...]`."""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .hub import stand_in
from .records import Records

# name of a task -> module and function, which is called with the records, the setting and the arguments
TASKS = {
    "environment": ("environment", "environment"),
    "small": ("checks", "small_cases"),
    "attention": ("checks", "attention_cases"),
    "shapes": ("checks", "model_shapes"),
    "step": ("step_checks", "one_step"),
    "graph": ("step_checks", "captured_steps"),
    "compile": ("step_times", "compile_reference"),
    "counts": ("floors", "step_counts"),
    "sanitizer": ("sanitizer", "sanitizer"),
    "sanitized": ("sanitizer", "sanitized"),
    "ops": ("op_times", "op_times"),
    "steps": ("step_times", "step_times"),
    "encoder": ("step_times", "encoder_times"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.part", description=__doc__)
    parser.add_argument("records", type=Path, help="file that records are added to")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--skip", type=int, default=0, help="number of items to skip")
    parser.add_argument("--dry-run", action="store_true", help="let the CPU pass for a GPU")
    options = parser.parse_args(arguments)
    run(options.records, options.skip, (options.task, *options.arguments), dry_run=options.dry_run)


def run(path: Path, skip: int, task: Sequence[str], *, dry_run: bool) -> None:
    """Run a task and write its records."""
    stand_in()
    warnings.simplefilter("ignore")
    from .setting import Setting

    if dry_run:
        from .dry import ForGood, pretend

        pretend(ForGood())
    name, *arguments = task
    module, function = TASKS[name]
    do: Any = getattr(importlib.import_module(f"bench.gpu.{module}"), function)
    do(Records(path, skip), Setting(dry_run), *arguments)


if __name__ == "__main__":
    main()

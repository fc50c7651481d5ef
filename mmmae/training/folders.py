"""The folder of a run for which the user named none."""

from __future__ import annotations

import re
from pathlib import Path

from .checkpoints import LAST, PREVIOUS


def default_folder(first: Path, resume: str | None = None) -> Path:
    """Return `first` if no run is there yet, else the next folder of the series FIRST, FIRST-2, FIRST-3 and so on.

    Args:
        first: folder of the first run.
        resume: None for a new folder; `auto` for that of the last run, if there is one; the path of a checkpoint for
            that of its run, if it is one of the series.
    """
    name = re.compile(rf"{re.escape(first.name)}(?:-(\d+))?")
    runs: dict[int, Path] = {}
    for config in first.parent.glob("*/config.json"):
        if match := name.fullmatch(config.parent.name):
            runs[int(match[1] or 1)] = config.parent
    if not runs:
        return first
    last = max(runs)
    if resume == "auto":
        return runs[last]
    if resume is not None:
        for folder in runs.values():
            if Path(resume).resolve() in ((folder / LAST).resolve(), (folder / PREVIOUS).resolve()):
                return folder
    return first.with_name(f"{first.name}-{last + 1}")

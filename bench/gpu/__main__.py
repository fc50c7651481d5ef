"""One command for every visit to a machine with a GPU: `python -m bench.gpu`, or `make gpu`.

It checks everything against float64, then takes times, within the minutes that are given. It installs nothing, and
needs neither network nor compiler. Everything that it finds is in one JSON file and one page; ten lines say what is
broken and what is slow. The exit status is 1 if something is broken.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .plan import stages
from .summary import is_broken, lines
from .visit import ROOT, Visit

FOLDER = ROOT / "bench" / "runs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it; default: 8")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, metavar="DIR", help="folder of the files; default: bench/runs"
    )
    parser.add_argument("--only", metavar="WORD", help="run only the parts whose name has this in it, such as `steps`")
    parser.add_argument("--dry-run", action="store_true", help="go through every part at small sizes on the CPU")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes:g}, expected a number > 0")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = stages(cores, options.only)
    if not chosen:
        parser.error(f"--only is {options.only!r}, which is in no part's name: {', '.join(names(cores))}")
    options.out.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc)
    file = options.out / f"gpu-{now:%Y%m%d-%H%M%S}.json"
    print(f"results: {file} and {file.with_suffix('.md').name}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as an interrupt: ends the parts and writes what they had
    with tempfile.TemporaryDirectory() as folder:
        visit = Visit(
            chosen,
            file,
            Path(folder),
            options.minutes,
            about={"started": now.isoformat(timespec="seconds"), "minutes": options.minutes},
            dry_run=options.dry_run,
            slots=cores,
            tell=lambda text: print(text, flush=True),
        )
        results = visit.run()
    print("\n".join(lines(results)), flush=True)
    return int(is_broken(results))


def names(cores: int) -> list[str]:
    """Return the names of all parts."""
    return [part.name for stage in stages(cores) for part in stage.parts]


if __name__ == "__main__":
    raise SystemExit(main())

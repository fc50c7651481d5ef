"""Compare two kept runs of the suite, the older first: `python -m bench.compare A.json B.json [--allow 1.1]`.

Times of two runs differ for many reasons. What is compared is the ratio of ours to the baseline that was timed in turn
with it, and counts. The exit status is 1 if a figure got worse by more than allowed, 2 if the runs can't be compared.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench.contenders import OURS as MODELS
from bench.op_work import BACKENDS
from bench.results import Measurement, Results, ratio

OURS = (*MODELS, *BACKENDS)  # attention's own `native` and `eager` among them
ALLOW = 1.1
ALLOW_EXACT = 1.01
EXACT = ("saved_bytes", "macs")  # the same in every run of the same code; the peak depends on libraries too


class Figure(NamedTuple):
    """The name of a figure: the case, the contender, and what was measured or counted."""

    where: str
    contender: str
    what: str


class Change(NamedTuple):
    """A figure in both runs, and how many times worse it is in the newer one."""

    figure: Figure
    old: float
    new: float
    worse: float


def figures(results: Results) -> dict[Figure, float]:
    """Return the known figures of ours: counts, and ratios to the baseline, above 1 where ours is faster."""
    found = {}
    for (group, case, allocator), measured in results.cases().items():
        baseline = next((one for one in measured if one.baseline), None)
        for one in measured:
            if one.contender in OURS:
                where = f"{group}, {case}, {one.dtype}, {one.device}, memory {allocator}"
                for what, amount in _amounts(one, baseline):
                    if amount is not None and not math.isnan(amount):
                        found[Figure(where, one.contender, what)] = amount
    return found


def _amounts(one: Measurement, baseline: Measurement | None) -> Iterator[tuple[str, float | None]]:
    if baseline is not None and baseline is not one:
        yield f"times as fast as {baseline.contender}", ratio(one, baseline)
    for what in ("peak_bytes", *EXACT):
        yield what, getattr(one, what)


def changes(old: Mapping[Figure, float], new: Mapping[Figure, float]) -> list[Change]:
    """Return the changes of the figures that both runs have, the worst first."""
    both = [(figure, old[figure], new[figure]) for figure in old if figure in new]
    found = [Change(*values, _worse(*values)) for values in both]
    return sorted(found, key=lambda change: (-change.worse, change.figure))


def _worse(figure: Figure, old: float, new: float) -> float:
    better, worse = (new, old) if figure.what.startswith("times") else (old, new)
    return worse / better if better else math.inf


def regressions(found: Iterable[Change], allow: float) -> list[Change]:
    """Return the changes for the worse by more than `allow`, or than `ALLOW_EXACT` for exact counts."""
    return [change for change in found if change.worse > (ALLOW_EXACT if change.figure.what in EXACT else allow)]


def table_of(worse: Iterable[Change]) -> Table:
    """Return a table of regressions, in the order given."""
    table = Table(box=box.SIMPLE, title="worse than allowed", title_justify="left")
    for number, head in enumerate(("case", "by", "what", "old", "new", "times worse")):
        table.add_column(head, justify="left" if number < 3 else "right", overflow="fold")
    for (where, contender, what), old, new, times in worse:
        amounts = (f"{old:.3f}", f"{new:.3f}") if what.startswith("times") else (f"{old:,.0f}", f"{new:,.0f}")
        table.add_row(where, contender, what, *amounts, f"{times:.3f}")
    return table


def only_in_one(old: Mapping[Figure, float], new: Mapping[Figure, float]) -> Iterator[str]:
    """Yield a line for each figure that one of the runs lacks."""
    for run, ones, others in (("older", old, new), ("newer", new, old)):
        for figure in ones:
            if figure not in others:
                yield f"only in the {run} run: {figure.where}: {figure.contender}, {figure.what}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: print what got worse, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description="Compare two kept runs of the suite.")
    parser.add_argument("older", type=Path, metavar="A.json")
    parser.add_argument("newer", type=Path, metavar="B.json")
    parser.add_argument(
        "--allow", type=float, default=ALLOW, help=f"factor by which a figure may get worse; default: {ALLOW}"
    )
    options = parser.parse_args(arguments)
    if not options.allow >= 1:
        parser.error(f"--allow is {options.allow:g}, expected a number >= 1")
    older, newer = (_read(path, parser) for path in (options.older, options.newer))
    old, new = figures(older), figures(newer)
    found = changes(old, new)
    if not found:
        parser.error(f"{options.older} and {options.newer} have no figure of ours in common")
    return _tell(found, options.allow, [*_warnings(older, newer), *only_in_one(old, new)])


def _read(path: Path, parser: argparse.ArgumentParser) -> Results:
    try:
        return Results.from_json(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error.strerror if isinstance(error, OSError) else error}")


def _warnings(older: Results, newer: Results) -> Iterator[str]:
    names = [
        f"{results.machine.get('name')} with {results.machine.get('threads')} threads" for results in (older, newer)
    ]
    if names[0] != names[1]:
        yield f"warning: the machines differ, {names[0]} and {names[1]}, so ratios can differ too"


def _tell(found: Sequence[Change], allow: float, lines: Iterable[str]) -> int:
    console = Console(markup=False, highlight=False)
    for line in lines:
        console.print(line, soft_wrap=True)
    worse = regressions(found, allow)
    if not worse:
        console.print(f"none of {len(found)} figures got worse by more than is allowed", soft_wrap=True)
        return 0
    console.print(table_of(worse))
    console.print(f"{len(worse)} of {len(found)} figures got worse by more than is allowed", soft_wrap=True)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())

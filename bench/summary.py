"""The README's table of a run: `python -m bench.summary bench/runs/FILE.json` prints it as Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.contenders import PEERS
from bench.page_tables import contender
from bench.results import Measurement, Results, by_case

OTHERS = ("reference, plain", "reference, SDPA", "reference, SDPA, compiled", *PEERS)
LIMITS = {"copy_gb_s": "a copy {:,.0f} GB/s", "gemm_gflop_s": "a matrix product {:,.0f} GFLOP/s"}
FIGURES: dict[str, Callable[[Measurement], int | None]] = {
    "peak memory": lambda one: one.peak_bytes,
    "saved for backward": lambda one: one.saved_bytes,
}


def markdown(results: Results) -> str:
    """What each contender takes over what the fast model takes, case by case, and the machine."""
    cases = by_case(one for one in results.measurements if one.group != "op" and one.x is None)
    rows = [row for measured in cases.values() for row in rows_of(measured)]
    heads = ["", "fast", *OTHERS]
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)]
    machine, versions = results.machine, results.versions
    speeds = [text.format(results.limits[name]) for name, text in LIMITS.items() if name in results.limits]
    place = f"{machine['cpu']}, {machine['threads']} threads; torch {versions['torch']}; {', '.join(speeds)}"
    return "\n".join([*lines, "", f"{results.date[:10]}, commit {results.commit}: {place}."]) + "\n"


def rows_of(measured: Sequence[Measurement]) -> Iterator[list[str]]:
    """A row of times, and of a training step one of each figure of memory that was counted."""
    fast = contender(measured, "fast")
    if fast is None:
        return
    kept = ", all keep freed memory" if fast.allocator == "kept" else ""
    title = fast.case.replace("image_size 112", "196 tokens")
    yield [f"{fast.group}: {title}{kept}", f"{fast.median:.2f} s", *over(measured, fast, lambda one: one.median)]
    for name, figure in FIGURES.items():
        own = figure(fast)
        if own and fast.group != "encoding":
            yield [f"… {name}", f"{own / 1e9:.2f} GB", *over(measured, fast, figure)]


def over(
    measured: Sequence[Measurement], fast: Measurement, figure: Callable[[Measurement], float | None]
) -> Iterator[str]:
    """A figure of each of the others over the fast model's; nothing of who took no part."""
    for name in OTHERS:
        other, own = contender(measured, name), figure(fast)
        theirs = None if other is None else figure(other)
        yield f"{theirs / own:.2f} x" if theirs and own else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.summary", description="Print a kept run's table.")
    parser.add_argument("results", type=Path, help="a JSON file of bench/runs/")
    options = parser.parse_args(arguments)
    try:
        print(markdown(Results.from_json(options.results.read_text())), end="")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {options.results}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

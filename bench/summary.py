"""The tables of a kept run as Markdown: `python -m bench.summary FILE.json` for the README, `--long` for all cases."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import mmmae
from bench.contenders import PEERS
from bench.model_cases import HALF
from bench.op_work import BACKENDS
from bench.page_tables import contender
from bench.results import Measurement, Results, by_case

OTHERS = ("reference, plain", "reference, SDPA", "reference, SDPA, compiled", *PEERS)
OTHERS_IN_HALF = (*OTHERS[1:], "fast, float32", "reference, SDPA, float32")
IMAGES = "all auxiliary images"
SHORT = (  # group, preset, and what else is said of the case
    ("training step", "base", ()),
    ("training step", "base", (IMAGES,)),
    ("training step", "vit", ()),
    ("encoding", "base", ()),
)
LIMITS = {"copy_gb_s": "a copy {:,.0f} GB/s", "gemm_gflop_s": "a matrix product {:,.0f} GFLOP/s"}
MEMORY: dict[str, Callable[[Measurement], int | None]] = {
    "peak memory": lambda one: one.peak_bytes,
    "saved for backward": lambda one: one.saved_bytes,
}


def short(results: Results) -> str:
    """Return the README's table: one row a workload, and what the others take over what the fast model takes.

    Then the same in bfloat16, beside float32. Cases that the run has not measured are left out.
    """
    cases = list(model_cases(results))
    found = [measured for row in SHORT for measured in cases if named(measured[0])[:3] == row]
    single = model_table([row_of_times(measured, OTHERS) for measured in found], OTHERS, found)
    half = list(model_cases(results, beside_float32=True))
    rows = [row_of_times(measured, OTHERS_IN_HALF) for measured in half]
    return single + model_table(rows, OTHERS_IN_HALF, half) + place(results)


def long(results: Results) -> str:
    """Return all models' times and memory, then all ops' times, each beside their baselines, compiled ones included."""
    others = (*OTHERS, "fast, compiled")
    found = list(model_cases(results, kept=True))
    rows = [row for measured in found for row in (row_of_times(measured, others), *rows_of_memory(measured, others))]
    half = list(model_cases(results, beside_float32=True))
    rows_in_half = [
        row
        for measured in half
        for row in (row_of_times(measured, OTHERS_IN_HALF), *rows_of_memory(measured, OTHERS_IN_HALF))
    ]
    tables = [model_table(rows, others, found), model_table(rows_in_half, OTHERS_IN_HALF, half)]
    ops = [measured for (group, *_), measured in results.cases().items() if group == "op"]
    for dtype in dict.fromkeys(measured[0].dtype for measured in ops):
        tables.append(op_table([measured for measured in ops if measured[0].dtype == dtype]))
    return "".join(tables) + place(results)


def model_cases(results: Results, kept: bool = False, beside_float32: bool = False) -> Iterator[list[Measurement]]:
    """Yield the cases in which the fast model was timed and nothing was varied along an axis.

    Args:
        results: of a run.
        kept: whether to yield cases in which every process keeps freed memory, too.
        beside_float32: whether to yield the cases in bfloat16 that have contenders in float32, or the others.
    """
    models = by_case(one for one in results.measurements if one.group != "op" and one.x is None)
    for (_, _, allocator), measured in models.items():
        mixed = len({one.dtype for one in measured}) > 1
        if (
            mixed == beside_float32
            and contender(measured, "fast")
            and (kept or allocator == "own")
            and not repeats(measured[0])
        ):
            yield measured


def named(one: Measurement) -> tuple[str, str, tuple[str, ...], str]:
    """Return a case's group, preset, the rest of what is said of it, and its batch: `base, batch 4` in parts."""
    preset, batch, *rest = one.case.split(", ")
    return one.group, preset, tuple(part for part in rest if part not in (one.dtype, HALF)), batch


def repeats(one: Measurement) -> bool:
    """Return whether a case only spells out a default of the config, and so repeats another case."""
    defaults = mmmae.MMMAEConfig()
    settings = (part.split(" ", 1) for part in named(one)[2] if part != IMAGES)
    return any(value == str(getattr(defaults, field, None)) for field, value in settings)


def model_table(rows: Iterable[Sequence[str]], others: Sequence[str], cases: Sequence[Sequence[Measurement]]) -> str:
    """Return a table of models, whose first cell says what all of its cases share; nothing without rows."""
    if not cases:
        return ""
    shared = sorted({f"{named(one)[3]}, {one.dtype}" for one, *_ in cases})
    names = [name.removeprefix("reference, ").removesuffix(", SDPA") for name in others]
    return table([" or ".join(shared), "fast", *names], rows)


def row_of_times(measured: Sequence[Measurement], others: Sequence[str]) -> list[str]:
    """Return a case, the fast model's time, and the time of each of the others over it."""
    group, preset, rest, _ = named(measured[0])
    kind = "encoding" if group == "encoding" else "training step"
    more = [part.replace("image_size 112", "196 tokens").removesuffix(" True").replace("_", " ") for part in rest]
    if measured[0].allocator == "kept":
        more.append("all keep freed memory")
    fast = contender(measured, "fast")
    seconds = f"{fast.median:.2f} s" if fast else ""
    return [", ".join((kind, f"`{preset}`", *more)), seconds, *over(measured, others, lambda one: one.median)]


def rows_of_memory(measured: Sequence[Measurement], others: Sequence[str]) -> Iterator[list[str]]:
    """Yield a row for each figure of memory that was counted in a training step."""
    fast = contender(measured, "fast")
    for name, figure in MEMORY.items():
        own = figure(fast) if fast else None
        if own and measured[0].group != "encoding":
            yield [f"… {name}", f"{own / 1e9:.2f} GB", *over(measured, others, figure)]


def over(
    measured: Sequence[Measurement], others: Sequence[str], figure: Callable[[Measurement], float | None]
) -> Iterator[str]:
    """Yield a figure of each of the others over the fast model's, and nothing for who took no part."""
    fast = contender(measured, "fast")
    own = figure(fast) if fast else None
    for name in others:
        other = contender(measured, name)
        theirs = figure(other) if other else None
        yield f"{theirs / own:.2f} x" if theirs and own else ""


def op_table(cases: Iterable[Sequence[Measurement]]) -> str:
    """Return a table of ops: ours, and over it the baseline in plain PyTorch, eager and compiled."""
    rows, batches = [], []
    for measured in cases:
        op, *samples = measured[0].case.split(", ")
        baseline = next((one for one in measured if one.baseline), None)
        ours = next((one for name in BACKENDS[:2] if (one := contender(measured, name))), None)
        if ours is None or baseline is None:
            continue
        compiled = contender(measured, f"{baseline.contender}, compiled")
        others = [f"{one.median / ours.median:.2f} x" if one else "" for one in (baseline, compiled)]
        rows.append([f"`{op}`", baseline.contender, f"{1e3 * ours.median:.2f} ms", *others])
        batches.append(", ".join(samples))
    if not rows:
        return ""
    work = f"{' or '.join(sorted(set(batches)))}, forward and backward"
    return table([work, "in PyTorch", "ours", "PyTorch", "PyTorch, compiled"], rows, words=2)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a Markdown table and an empty line; its first columns hold words, the others numbers."""
    rule = [*["---"] * words, *["---:"] * (len(heads) - words)]
    body = [[*row[:words], *(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in row[words:])] for row in rows]
    return "".join("| " + " | ".join(row) + " |\n" for row in (heads, rule, *body)) + "\n"


def place(results: Results) -> str:
    """Return a line on the machine and the code that were measured."""
    machine, versions = results.machine, results.versions
    speeds = [text.format(results.limits[name]) for name, text in LIMITS.items() if name in results.limits]
    where = f"{machine['cpu']}, {machine['threads']} threads; torch {versions['torch']}; {', '.join(speeds)}"
    return f"{results.date[:10]}, commit {results.commit}: {where}.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.summary", description="Print the table of a kept run.")
    parser.add_argument("results", type=Path, help="a JSON file of bench/runs/")
    parser.add_argument(
        "--long", action="store_true", help="print every case with its memory, and the ops, as in docs/performance.md"
    )
    options = parser.parse_args(arguments)
    try:
        results = Results.from_json(options.results.read_text())
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {options.results}: {error}\n")
    print(long(results) if options.long else short(results), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

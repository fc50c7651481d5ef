"""The README's chart of speed, drawn from kept runs on one machine.

`python -m bench.chart bench/runs/*-amd-*.json --out docs/speed.svg`
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from bench.page_plots import BLUE, GREY, INK, LOOK
from bench.page_tables import contender
from bench.results import Results
from mmmae.files import write_atomically

CASE = ("training step", "base, batch 4", "own")
BARS = {
    "fast": "mmmae.fast_model",
    "reference, SDPA": "same model in PyTorch, SDPA",
    "reference, SDPA, compiled": "same, torch.compile",
    "reference, plain": "same, eager attention",
    "ViTMAE, SDPA": "ViTMAE of the same size, SDPA",
    "VideoMAE, SDPA": "VideoMAE of the same size, SDPA",
}


def lowest_ratios(runs: Sequence[Results]) -> dict[str, float]:
    """Return each contender's time over the fast model's in a training step of `base`, the lowest of the runs."""
    ratios: dict[str, float] = {}
    for results in runs:
        measured = results.cases().get(CASE, [])
        fast = contender(measured, "fast")
        for name in BARS:
            other = contender(measured, name)
            if fast is not None and other is not None:
                ratios[name] = min(other.median / fast.median, ratios.get(name, float("inf")))
    return ratios


def draw(runs: Sequence[Results]) -> str:
    """Return an SVG of `lowest_ratios`, for runs on one machine.

    Raises:
        ValueError: the runs are from several machines, or none has timed the fast model.
    """
    machines = {f"{run.machine['cpu'].split(' (')[0]}, {run.machine['threads']} threads" for run in runs}
    ratios = lowest_ratios(runs)
    if len(machines) != 1 or "fast" not in ratios:
        raise ValueError(f"expected runs on one machine that time the fast model in {', '.join(CASE[:2])}")
    bars = {name: ratios[name] for name in BARS if name in ratios}
    with matplotlib.rc_context({**LOOK, "svg.fonttype": "path"}):
        figure = Figure(figsize=(8.4, 0.9 + 0.27 * len(bars)), layout="constrained")
        axes = figure.subplots()
        for row, (name, ratio) in enumerate(bars.items()):
            ours = name == "fast"
            axes.barh(row, ratio, height=0.66, color=BLUE if ours else GREY)
            axes.text(ratio, row, f" {ratio:.2f}", va="center", color=INK, fontweight="bold" if ours else "normal")
        axes.set_yticks(range(len(bars)), [BARS[name] for name in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1 * max(bars.values()))
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks([])
        case = f"base (94 M parameters), batch 4, float32; {machines.pop()}"
        axes.set_xlabel(f"{case}; the lowest ratio of {len(runs)} runs")
        figure.suptitle("Time of a training step (less is better)", x=0.01, ha="left", fontsize=10, fontweight="bold")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.chart", description="Draw the README's chart of speed.")
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of bench/runs/, of one machine")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the SVG file to write")
    options = parser.parse_args(arguments)
    try:
        drawing = draw([Results.from_json(path.read_text()) for path in options.results])
        write_atomically(options.out, lambda path: path.write_text(drawing))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

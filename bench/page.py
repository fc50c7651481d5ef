"""A run of the bench suite as one HTML page that needs nothing from elsewhere.

python -m bench.page RESULTS.json [OUT.html]
"""

from __future__ import annotations

import argparse
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from bench.page_plots import (
    Bar,
    Point,
    curves,
    grouped_bars,
    ratio_bars,
    roofline,
    share_bars,
    sunburst,
)
from bench.page_tables import (
    MODEL_LEGEND,
    OURS,
    contender,
    model_table,
    op_table,
    prediction_table,
    scaling_table,
    slower,
    timed,
    title_of,
)
from bench.predictions import GPUS
from bench.results import Measurement, Prediction, Results, by_case, ratio
from mmmae.cost.page import STYLE

LOOK = """
body { max-width: 70rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); gap: .8rem;
  align-items: start; margin: .8rem 0; }
.plot { background: #fff; border-radius: 6px; overflow-x: auto; margin: 0; } .wide { grid-column: 1 / -1; }
.plot svg { height: auto; background: none; } .wide svg { min-width: 44rem; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { color: var(--soft); }
dd { margin: 0; } tr:last-child td { font-weight: inherit; } td { white-space: nowrap; }
th { vertical-align: bottom; } th, td { padding: .25rem .4rem; }
h3 { font-size: .95rem; margin: 1.3rem 0 .3rem; } summary { cursor: pointer; color: var(--soft); margin: .4rem 0; }
.slower { color: var(--bad); } ul.slower { margin: .4rem 0; }
.predicted { background: var(--track); border: 2px dashed var(--soft); border-radius: 6px; padding: 0 1rem 1rem;
  margin-top: 2.5rem; }
"""
READING = (
    "Times are medians of rounds, with the least and the greatest in brackets. The contenders of a case ran in turn, "
    "once each a round, so that a slow moment of the machine hit all of them. A ratio of 2 says twice as fast, one "
    "below 1 slower."
)
LINEAR = ("mask ratio", "decode fraction")
X_LABELS = {"bands": "tokens, by more bands", "image size": "tokens, by larger images", "batch": "samples in a batch"}
MEMORY = {"peak of tensors": "peak_bytes", "process": "resident_bytes", "saved for backward": "saved_bytes"}


def render(results: Results) -> str:
    """The page; sections without data are left out."""
    ops = [one for one in results.measurements if one.group == "op"]
    models = [one for one in results.measurements if one.group != "op" and one.x is None]
    varied = [one for one in results.measurements if one.group != "op" and one.x is not None]
    sections = {
        "Models": model_section(models),
        "How many times as fast": speedup_section(models),
        "Ops": op_section(ops),
        "Roofline": roofline_section(ops, results.limits),
        "Memory": memory_section(models),
        "Scaling": scaling_section(varied),
        "Multiply-adds": bill_section(results.profiles),
    }
    body = "\n".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections.items() if content)
    title = html.escape(f"mmmae bench, {results.date[:10]}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}{LOOK}</style></head><body>\n'
        f"<h1>{title}</h1>{facts(results)}\n{body}\n{predicted_section(results.predictions)}</body></html>\n"
    )


def facts(results: Results) -> str:
    """Who measured what, on which machine, and how to read it."""
    copy, gemm = _limits(results.limits)
    limits = [f"copy {copy:,.1f} GB/s"] if copy else []
    limits += [f"matrix product {gemm:,.0f} GFLOP/s"] if gemm else []
    rows = {
        "date": results.date,
        "commit": results.commit + (" (a tree with changes)" if results.commit.endswith("+") else ""),
        "machine": _machine(results.machine),
        "versions": _listed(results.versions),
        "options": _listed(results.options),
        "measured limits": ", ".join(limits),
    }
    lines = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in rows.items() if text)
    return f'<dl>{lines}</dl><p class="soft">{READING}</p>'


def model_section(models: Sequence[Measurement]) -> str:
    """A table a case, and on top where ours is slower."""
    cases = by_case(models)
    parts = [_verdict(cases.values()), f'<p class="soft">{MODEL_LEGEND}</p>'] if models else []
    for group, case in dict.fromkeys((group, case) for group, case, _ in cases):
        own, kept = (cases.get((group, case, allocator), []) for allocator in ("own", "kept"))
        parts.append(f"<h3>{html.escape(f'{group}: {case}')}</h3>{model_table(own, kept)}")
    return "".join(parts)


def speedup_section(models: Sequence[Measurement]) -> str:
    """The time of each contender over that of the fast model."""
    plots = {}
    for measured in by_case(models).values():
        fast = contender(measured, "fast")
        if fast is not None:
            others = [one for one in measured if timed(one) and one is not fast]
            plots[title_of(fast)] = [_bar(one.contender, one, fast) for one in others]
    return _ratio_plots(plots, "its time over that of fast; whiskers: single rounds")


def op_section(ops: Sequence[Measurement]) -> str:
    """The time of each op's baseline over that of each variant, and all numbers."""
    cases, plots = by_case(ops), {}
    for measured in cases.values():
        baseline = next((one for one in measured if one.baseline and timed(one)), None)
        if baseline is not None:
            others = [one for one in measured if timed(one) and one is not baseline]
            bars = [_bar(one.contender, baseline, one, one.contender in OURS) for one in others]
            plots[f"{baseline.case}, against {baseline.contender}"] = bars
    numbers = f"<details><summary>all numbers</summary>{op_table(cases.values())}</details>" if cases else ""
    return _verdict(cases.values()) + _ratio_plots(plots, "times as fast; whiskers: single rounds") + numbers


def roofline_section(ops: Sequence[Measurement], limits: Mapping[str, float]) -> str:
    """Ops with matrix products under the machine's roofs; the others next to a copy."""
    copy, gemm = _limits(limits)
    known = [one for one in ops if timed(one) and one.bytes]
    products = [one for one in known if one.macs]
    plots = []
    if products and copy and gemm:
        points = [point for measured in by_case(products).values() for point in _points(measured)]
        plots.append(roofline("Ops with matrix products", points, copy, gemm))
    moves = [one for one in known if not one.macs]
    if moves and copy:
        bars = [(f"{one.case}: {one.contender}", one.rates["GB/s"] / copy, one.contender in OURS) for one in moves]
        plots.append(share_bars("Ops that only move bytes", "bytes that have to move a second, over a copy's", bars))
    return _grid(plots, wide=True)


def memory_section(models: Iterable[Measurement]) -> str:
    """Of each case in which something is trained."""
    plots = []
    for measured in by_case(one for one in models if one.group != "encoding").values():
        kinds = {
            kind: [math.nan if getattr(one, field) is None else getattr(one, field) / 1e9 for one in measured]
            for kind, field in MEMORY.items()
        }
        if not all(map(math.isnan, chain(*kinds.values()))):
            plots.append(grouped_bars(title_of(measured[0]), "GB", [one.contender for one in measured], kinds))
    return _grid(plots)


def scaling_section(varied: Sequence[Measurement]) -> str:
    """Of each group time and memory against what is varied, side by side, and all numbers."""
    plots = []
    for group in dict.fromkeys(one.group for one in varied):
        measured = [one for one in varied if one.group == group]
        log = group not in LINEAR and all(one.x and one.x > 0 for one in measured)
        label = X_LABELS.get(group, group)
        times = _series(measured, lambda one: one.median)
        kind = "process" if any(one.resident_bytes for one in measured) else "peak of tensors"
        memory = _series(measured, lambda one, field=MEMORY[kind]: (getattr(one, field) or math.nan) / 1e9)
        if times:
            plots.append(curves(f"{group}: time", (label, "seconds"), times, log, fit=True))
        if memory:
            plots.append(curves(f"{group}: memory, {kind}", (label, "GB"), memory, log, fit=False))
    numbers = f"<details><summary>all numbers</summary>{scaling_table(varied)}</details>" if varied else ""
    return _grid(plots) + numbers


def bill_section(profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """Of each preset the multiply-adds of a pretraining forward pass of one sample, by component."""
    plots = []
    for preset, profile in profiles.items():
        rows, batch = profile["pretraining"]["rows"], profile["batch"]
        size, unit = (1e9, "GMAC") if sum(row["macs"] for row in rows) >= 1e9 * batch else (1e6, "MMAC")
        macs = {row["component"]: row["macs"] / batch / size for row in rows if row["macs"]}
        if macs:
            plots.append(sunburst(f"{preset}: a sample's pretraining forward pass", macs, unit))
    return _grid(plots)


def predicted_section(predictions: Sequence[Prediction]) -> str:
    """Floors on GPUs, set apart from what was measured."""
    parts = []
    for gpu in dict.fromkeys(one.gpu for one in predictions):
        peak = GPUS.get(gpu)
        peaks = f": {peak.flops / 1e12:,.0f} TFLOP/s, {peak.bandwidth / 1e12:.2f} TB/s" if peak else ""
        models = [one for one in predictions if one.gpu == gpu and one.group != "op"]
        ops = [one for one in predictions if one.gpu == gpu and one.group == "op"]
        parts.append(f"<h3>{html.escape(gpu)}{peaks}</h3>{prediction_table(models) if models else ''}")
        parts += [f"<details><summary>ops</summary>{prediction_table(ops)}</details>"] if ops else []
    if not parts:
        return ""
    label = "<b>Computed from counts and published peaks; nothing here was measured.</b>"
    why = (
        "A floor is the sum over operators of what takes longer: multiply-adds at the peak in bfloat16, or bytes at "
        "that of the memory. The bound is the ratio of two floors: what fusing can gain where both run at these peaks."
    )
    parts = [f"<h2>Predictions for GPUs</h2><p>{label}</p><p class='soft'>{why}</p>", *parts]
    return f'<section class="predicted">{"".join(parts)}</section>\n'


def _listed(values: Mapping[str, Any]) -> str:
    """Names and values in a line, without what is not set."""
    shown = {name.replace("_", " "): value for name, value in values.items() if value not in (None, False, "")}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in shown.items())


def _machine(machine: Mapping[str, Any]) -> str:
    """What times depend on, in words."""
    units = {"cpu": "", "gpu": "", "cores": " cores", "threads": " threads", "memory_gb": " GB", "system": ""}
    return ", ".join(f"{machine[field]}{unit}" for field, unit in units.items() if machine.get(field))


def _limits(limits: Mapping[str, float]) -> tuple[float, float]:
    """Speed of a copy and of a matrix product, 0 where it is not known."""
    copy, gemm = (limits.get(name) or 0.0 for name in ("copy_gb_s", "gemm_gflop_s"))
    return copy if copy > 0 else 0.0, gemm if gemm > 0 else 0.0  # NaN is not


def _verdict(cases: Iterable[Sequence[Measurement]]) -> str:
    """Where ours is slower than another contender, or that it is nowhere; nothing without a comparison."""
    known = [[one for one in measured if timed(one)] for measured in cases]
    compared = [measured for measured in known if len({one.contender in OURS for one in measured}) == 2]
    found = [sentence for measured in compared for sentence in slower(measured)]
    if found:
        lines = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found)
        return f'<p>Ours is slower here:</p><ul class="slower">{lines}</ul>'
    return "<p>Ours is nowhere slower than another contender.</p>" if compared else ""


def _bar(name: str, slow: Measurement, quick: Measurement, ours: bool = True) -> Bar:
    """How many times as fast one is as the other: of medians, and of single rounds."""
    value = ratio(quick, slow)
    rounds = [a / b for a, b in zip(slow.seconds, quick.seconds, strict=False) if a > 0 and b > 0] or [value]
    return Bar(name, value, min(rounds), max(rounds), ours)


def _ratio_plots(plots: Mapping[str, Sequence[Bar]], label: str) -> str:
    """All on one scale."""
    bars = [bar for group in plots.values() for bar in group]
    span = min([0.8, *(bar.low for bar in bars)]), max([1.25, *(bar.high for bar in bars)])
    return _grid([ratio_bars(title, label, group, span) for title, group in plots.items() if group])


def _points(measured: Sequence[Measurement]) -> list[Point]:
    """A case on the roofline; the fastest of ours has the case's name."""
    best = min(measured, key=lambda one: (one.contender not in OURS, one.median))
    return [
        Point(
            2 * (one.macs or 0) / (one.bytes or 1),
            one.rates["GFLOP/s"],
            one.contender in OURS,
            one.case if one is best else "",
        )
        for one in measured
    ]


def _series(
    measured: Iterable[Measurement], amount: Callable[[Measurement], float]
) -> dict[str, list[tuple[float, float]]]:
    """Points by contender, in the order of x, of what is known and above 0."""
    series: dict[str, list[tuple[float, float]]] = {}
    for one in sorted(measured, key=lambda one: one.x or 0.0):
        if amount(one) > 0:
            series.setdefault(one.contender, []).append((one.x or 0.0, amount(one)))
    return dict(sorted(series.items()))


def _grid(plots: Sequence[str], wide: bool = False) -> str:
    kind = "plot wide" if wide else "plot"
    figures = "".join(f'<figure class="{kind}">{plot}</figure>' for plot in plots)
    return f'<div class="plots">{figures}</div>' if plots else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.page", description="Make the page of a stored run.")
    parser.add_argument("results", type=Path, help="a JSON file of bench/runs/")
    parser.add_argument("page", type=Path, nargs="?", help="the HTML file to write; default: beside the results")
    options = parser.parse_args(arguments)
    try:
        results = Results.from_json(options.results.read_text())
        page = options.page or options.results.with_suffix(".html")
        page.write_text(render(results))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {options.results}: {error}\n")
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

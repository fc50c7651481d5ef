"""The sections of the bench page: what was measured and computed, as plots and tables."""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.page_plots import WIDE, Bar, Line, Point, bars, curves, roofline, sunburst
from bench.page_tables import (
    MODEL_LEGEND,
    OURS,
    SLOWER,
    fastest_of_ours,
    model_table,
    op_table,
    ours_first,
    prediction_table,
    scale_of,
    scaling_table,
    shared_parts,
    short_title,
    slower,
    timed,
    words_of,
)
from bench.predictions import GPUS, GRAPH_GAP, HOST_LAUNCH
from bench.results import Measurement, Prediction, by_case

LINEAR = ("mask ratio", "decode fraction")
X_LABELS = {"bands": "tokens, by more bands", "image size": "tokens, by larger images", "batch": "samples in a batch"}
MEMORY = {
    "peak memory": "peak_bytes",
    "saved for backward": "saved_bytes",
    "memory of the process": "resident_bytes",
}


def model_section(models: Sequence[Measurement]) -> str:
    """Return plots of time and memory under a heading for each training step and for each other group, and numbers."""
    cases = by_case(models)
    if not cases:
        return ""
    shared = shared_parts(one.case for one in models)
    titles = {key: short_title(measured[0], shared) for key, measured in cases.items()}
    parts = [_workload(models, shared), _verdict([(titles[key], cases[key]) for key in cases])]
    groups: dict[str, list[tuple[str, str]]] = {}  # by heading
    for group, case in dict.fromkeys((group, case) for group, case, _ in cases):
        title = next(titles[key] for key in titles if key[:2] == (group, case))
        groups.setdefault(title if group == "training step" else f"{group[0].upper()}{group[1:]}", []).append(
            (group, case)
        )
    for number, (title, keys) in enumerate(groups.items()):
        plots: list[str] = []
        numbers = ""
        common = [*shared, *shared_parts(case for _, case in keys)] if len(keys) > 1 else []
        for group, case in keys:
            own, kept = (cases.get((group, case, allocator), []) for allocator in ("own", "kept"))
            name = ", ".join(words_of(case, common)) if common else ""
            lead = f"{name}: " if name else ""
            plots += [time_plot(f"{lead}time", own), *(memory_plots(lead, own) if group != "encoding" else [])]
            plots += [time_plot(f"{lead}time if all keep freed memory", kept)]
            numbers += (f'<p class="soft">{html.escape(name)}</p>' if name else "") + model_table(own, kept)
        details = f"<details><summary>all numbers</summary>{numbers}</details>"
        parts.append(heading("models", number, title) + _grid([plot for plot in plots if plot]) + details)
    return "".join([*parts, f'<p class="soft">{MODEL_LEGEND}</p>'])


def time_plot(title: str, measured: Sequence[Measurement]) -> str:
    """Return bars of the contenders' times and their ratios to ours, or nothing if none was timed."""
    known = ours_first(one for one in measured if timed(one))
    if not known:
        return ""
    ours = fastest_of_ours(known)
    size, unit = scale_of(max(one.median for one in known))
    rows = []
    for one in known:
        text, bad = digits(one.median / size) + f" {unit}", False
        if ours is not None and one is not ours:
            times = one.median / ours.median
            text, bad = f"{text}, {times:.2f} x", one.contender not in OURS and times * SLOWER < 1
        spread = min(one.seconds) / size, max(one.seconds) / size
        rows.append(Bar(one.contender, one.median / size, text, one.contender in OURS, spread, bad))
    return bars(title, {"s": "seconds", "ms": "milliseconds", "µs": "microseconds"}[unit], rows)


def memory_plots(lead: str, measured: Sequence[Measurement]) -> list[str]:
    """Return bars of each figure of memory that is known; that of the process only where the peak is not."""
    plots: list[str] = []
    for title, field in MEMORY.items():
        known = ours_first(one for one in measured if getattr(one, field))
        if known and not (plots and field == "resident_bytes"):
            ours = next((getattr(one, field) for one in known if one.contender in OURS), math.nan)
            rows = []
            for one in known:
                amount = getattr(one, field)
                times = "" if one.contender in OURS or math.isnan(ours) else f", {amount / ours:.2f} x"
                text = f"{digits(amount / 1e9)} GB{times}"
                rows.append(Bar(one.contender, amount / 1e9, text, one.contender in OURS))
            plots.append(bars(f"{lead}{title}", "GB", rows))
    return plots


def op_section(ops: Sequence[Measurement]) -> str:
    """Return a plot of times for each op, the numbers of all, and before them where ours is slower."""
    cases = list(by_case(ops).values())
    if not cases:
        return ""
    shared = shared_parts(measured[0].case for measured in cases) if len(cases) > 1 else []
    titles = [short_title(measured[0], shared) for measured in cases]
    plots = [time_plot(title, measured) for title, measured in zip(titles, cases, strict=True)]
    intro = _workload(ops, shared, "Forward, and backward where there is one.")
    numbers = f"<details><summary>all numbers</summary>{op_table(cases, shared)}</details>"
    return intro + _verdict([*zip(titles, cases, strict=True)]) + _grid([plot for plot in plots if plot]) + numbers


def roofline_section(ops: Sequence[Measurement], limits: Mapping[str, float]) -> str:
    """Return ops with matrix products under the machine's roofs, and the others next to a copy."""
    copy, gemm = limits_of(limits)
    known = [one for one in ops if timed(one) and one.bytes]
    cases = list(dict.fromkeys(one.case for one in known))
    shared = shared_parts(cases) if len(cases) > 1 else []
    products = [one for one in known if one.macs]
    plots = []
    if products and copy and gemm:
        points = [point for measured in by_case(products).values() for point in _points(measured, shared)]
        plots.append(roofline("Ops with matrix products", points, copy, gemm))
    moves = [one for one in known if not one.macs]
    if moves and copy:
        rows = []
        fastest = [one for case in by_case(moves).values() for one in _ours_and_the_fastest_other(case)]
        for one in fastest:
            share = one.rates["GB/s"] / copy
            name = f"{short_title(one, shared)}: {one.contender}"
            rows.append(Bar(name, share, f"{share:.2f}", one.contender in OURS))
        label = "bytes that have to move a second, over a copy's"
        plots.append(bars("Ops that only move bytes: ours and the fastest other", label, rows, line=1.0, width=WIDE))
    return _grid(plots, wide=True)


def scaling_section(varied: Sequence[Measurement]) -> str:
    """Return, for each group, time and memory against what is varied, and the numbers."""
    if not varied:
        return ""
    shared = shared_parts(one.case for one in varied)
    plots = []
    for group in dict.fromkeys(one.group for one in varied):
        measured = [one for one in varied if one.group == group]
        parts = shared_parts(one.case for one in measured) if len(measured) > 1 else []
        log = group not in LINEAR and all(one.x and one.x > 0 for one in measured)
        label = X_LABELS.get(group, group)
        field = "resident_bytes" if any(one.resident_bytes for one in measured) else "peak_bytes"
        kind = next(name for name, other in MEMORY.items() if other == field)
        times = _lines(measured, lambda one: one.median)
        memory = _lines(measured, functools.partial(_gigabytes, field=field))
        title = ", ".join([f"{group[0].upper()}{group[1:]}", *(part for part in parts if part not in shared)])
        plots += [curves(f"{title}: time", (label, "seconds"), times, log, fit=True)] if times else []
        plots += [curves(f"{title}: {kind}", (label, "GB"), memory, log, fit=False)] if memory else []
    numbers = f"<details><summary>all numbers</summary>{scaling_table(varied, shared)}</details>"
    return _workload(varied, shared) + _grid(plots) + numbers


def macs_section(profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """Return, for each preset, the multiply-adds of a sample's pretraining forward pass by component."""
    plots = []
    for preset, profile in profiles.items():
        rows, batch = profile["pretraining"]["rows"], profile["batch"]
        size, unit = (1e9, "GMAC") if sum(row["macs"] for row in rows) >= 1e9 * batch else (1e6, "MMAC")
        macs = {row["component"]: row["macs"] / batch / size for row in rows if row["macs"]}
        if macs:
            plots.append(sunburst(preset, macs, unit))
    intro = '<p class="soft">Of one sample, forward through encoder, auxiliary encoders, decoder and losses.</p>'
    return intro + _grid(plots) if plots else ""


def predicted_section(predictions: Sequence[Prediction]) -> str:
    """Return floors on GPUs, set apart from what was measured."""
    if not predictions:
        return ""
    shared = shared_parts({one.case: None for one in predictions})
    label = "<b>Computed from counts and published peaks; nothing here was measured.</b>"
    why = (
        "A floor is the sum over operators of what takes longer: multiply-adds at the peak in bfloat16, or bytes at "
        "that of the memory. The bound is the ratio of two floors: what fusing can gain where both run at these peaks. "
        f"With a graph, {GRAPH_GAP * 1e6:.0f} us a launch is added to the floors; without, Python takes "
        f"{HOST_LAUNCH * 1e6:.0f} us a launch, which counts where it is longer."
    )
    work = html.escape(f"All with {', '.join(shared)}. " if shared else "")
    parts = [f'<p>{label}</p><p class="soft">{work}{why}</p>']
    for gpu in dict.fromkeys(one.gpu for one in predictions):
        peak = GPUS.get(gpu)
        peaks = f": {peak.flops / 1e12:,.0f} TFLOP/s, {peak.bandwidth / 1e12:.2f} TB/s" if peak else ""
        models = [one for one in predictions if one.gpu == gpu and one.group != "op"]
        ops = [one for one in predictions if one.gpu == gpu and one.group == "op"]
        tables = "".join(prediction_table(kind, shared) for kind in (models, ops) if kind)
        parts.append(f"<details><summary>{html.escape(gpu)}{peaks}</summary>{tables}</details>")
    return "".join(parts)


def limits_of(limits: Mapping[str, float]) -> tuple[float, float]:
    """Return the speeds of a copy and of a matrix product, 0 where one is not known."""
    copy, gemm = (limits.get(name) or 0.0 for name in ("copy_gb_s", "gemm_gflop_s"))
    return copy if copy > 0 else 0.0, gemm if gemm > 0 else 0.0  # NaN is not


def heading(section: str, number: int, text: str) -> str:
    """Return a heading that the contents link to."""
    return f'<h3 id="{section}-{number}">{html.escape(text)}</h3>'


def _workload(measured: Sequence[Measurement], shared: Sequence[str], more: str = "") -> str:
    """Return what all measurements of a section have in common, which is not said again below."""
    types = list(dict.fromkeys(one.dtype for one in measured if one.dtype not in shared))
    devices = list(dict.fromkeys(one.device for one in measured))
    text = f"All with {', '.join([*shared, ' or '.join(types), 'on ' + ' or '.join(devices)])}. {more}"
    return f'<p><span class="key"></span> Blue is ours. {html.escape(text)}</p>'


def _verdict(cases: Iterable[tuple[str, Sequence[Measurement]]]) -> str:
    """Return where ours is slower than another contender, or that it is nowhere; nothing without a comparison."""
    known = [(title, [one for one in measured if timed(one)]) for title, measured in cases]
    compared = [(title, case) for title, case in known if len({one.contender in OURS for one in case}) == 2]
    found = [sentence for title, measured in compared for sentence in slower(measured, title)]
    if found:
        lines = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found)
        return f'<p>Ours is slower here:</p><ul class="slower">{lines}</ul>'
    return "<p>Ours is nowhere slower than another contender.</p>" if compared else ""


def digits(number: float) -> str:
    """Return a number in three digits or more."""
    decimals = 3 if number < 1 else 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:,.{decimals}f}"


def _ours_and_the_fastest_other(case: Sequence[Measurement]) -> list[Measurement]:
    others = [one for one in case if one.contender not in OURS]
    return [*(one for one in case if one.contender in OURS), *sorted(others, key=lambda one: one.median)[:1]]


def _points(measured: Sequence[Measurement], shared: Sequence[str]) -> list[Point]:
    """Return the points of a case on the roofline; the fastest of ours has the case's name."""
    best = min(measured, key=lambda one: (one.contender not in OURS, one.median))
    return [
        Point(
            2 * (one.macs or 0) / (one.bytes or 1),
            one.rates["GFLOP/s"],
            one.contender in OURS,
            short_title(one, shared) if one is best else "",
        )
        for one in measured
    ]


def _gigabytes(one: Measurement, field: str) -> float:
    """Return a figure of memory in GB, NaN where it is not known."""
    return (getattr(one, field) or math.nan) / 1e9


def _lines(measured: Iterable[Measurement], amount: Callable[[Measurement], float]) -> list[Line]:
    """Return a line a contender through what is known and above 0, in the order of x."""
    series: dict[str, list[tuple[float, float]]] = {}
    for one in sorted(measured, key=lambda one: one.x or 0.0):
        if amount(one) > 0:
            series.setdefault(one.contender, []).append((one.x or 0.0, amount(one)))
    return [Line(name, name in OURS, points) for name, points in sorted(series.items())]


def _grid(plots: Sequence[str], wide: bool = False) -> str:
    kind = "plot wide" if wide else "plot"
    figures = "".join(f'<figure class="{kind}">{plot}</figure>' for plot in plots)
    return f'<div class="plots">{figures}</div>' if plots else ""

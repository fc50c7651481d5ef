"""The page's tables, the names of its cases, and the sentences on where ours is slower."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from bench.contenders import OURS as OUR_MODELS
from bench.op_work import BACKENDS
from bench.predictions import OURS as PREDICTED_OURS
from bench.predictions import speedup_bound, with_graph, without_graph
from bench.results import Measurement, Prediction, ratio

OURS = (*OUR_MODELS, "triton", "native")
SETTINGS = {
    "image_size 112": "196 tokens",
    "activation_checkpointing True": "with checkpointing",
    "activation_checkpointing False": "without checkpointing",
}
SLOWER = 1.005  # times as long: what is not 1.00 in two digits


def timed(one: Measurement | None) -> bool:
    """Return whether there is a time to show."""
    return one is not None and math.isfinite(one.median) and one.median > 0


def contender(measured: Iterable[Measurement], name: str) -> Measurement | None:
    """Return the measurement of this contender, or None if it was not timed."""
    return next((one for one in measured if one.contender == name and timed(one)), None)


def fastest_of_ours(measured: Iterable[Measurement]) -> Measurement | None:
    """Return `fast`, or the fastest backend of an op, or None if none was timed."""
    ours = [one for one in measured if one.contender in OURS and timed(one)]
    return contender(ours, "fast") or min(ours, key=lambda one: one.median, default=None)


def ours_first(measured: Iterable[Measurement]) -> list[Measurement]:
    """Return measurements in their order, but ours before the others."""
    return sorted(measured, key=lambda one: one.contender not in OURS)


def title_of(one: Measurement) -> str:
    """Return a case in words: `training step: base, batch 4`."""
    kept = ", every process keeps freed memory" if one.allocator == "kept" else ""
    return (one.case if one.group == "op" else f"{one.group}: {one.case}") + kept


def shared_parts(cases: Iterable[str]) -> list[str]:
    """Return the parts that all cases have: `base, batch 4` and `vit, batch 4` share `batch 4`."""
    split = [case.split(", ") for case in cases]
    return [part for part in (split[0] if split else []) if all(part in parts for parts in split)]


def short_title(one: Measurement, shared: Sequence[str]) -> str:
    """Return a case in words without the shared parts, and with the kind of work first, except for ops."""
    words = words_of(one.case, shared)
    if one.group != "op":
        words = ["Encoding" if one.group == "encoding" else "Training step", *words]
    return ", ".join(words)


def words_of(case: str, shared: Sequence[str]) -> list[str]:
    """Return the parts of a case without the shared ones, settings of the config in words."""
    return [SETTINGS.get(part, part) for part in case.split(", ") if part not in shared]


def slower(measured: Sequence[Measurement], title: str) -> Iterator[str]:
    """Yield a sentence for each of ours and each other contender of a case that it is slower than."""
    others = [one for one in measured if one.contender not in (*OURS, *BACKENDS) and timed(one)]
    for ours in (one for one in measured if one.contender in OURS and timed(one)):
        for other in others:
            times = ratio(other, ours)
            if times > SLOWER:
                yield f"{title}: {ours.contender} is {times:.2f} times as slow as {other.contender}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], ours: Callable[[Sequence[str]], bool]) -> str:
    """Return an HTML table of plain text.

    Columns without any text are left out, rows for which `ours` returns true are marked, and a cell that says `slower`
    stands out.
    """
    shown = [column for column in range(len(heads)) if any(row[column] for row in rows)]
    head = "".join(_cell("th", heads[column]) for column in shown)
    lines = ""
    for row in rows:
        mark = ' class="ours"' if ours(row) else ""
        lines += f"<tr{mark}>" + "".join(_cell("td", row[column]) for column in shown) + "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(tag: str, text: str) -> str:
    mark = ' class="slower"' if text.startswith("slower") else ""
    return f"<{tag}{mark}>{html.escape(text)}</{tag}>"


MODEL_HEADS = (
    "contender",
    "median (from, to)",
    "x as fast as baseline",
    "fast is x as fast",
    "samples/s",
    "over limit",
    "peak, GB",
    "process, GB",
    "saved, GB",
    "kept: median (from, to)",
    "kept: fast is x as fast",
)
MODEL_LEGEND = (
    "In the tables, over limit: the time over that of the fast model's matrix products alone, attention's at the speed "
    "of a square one, and which share of it they could be. "
    "Peak: of tensors, with parameters and data. Process: memory of the whole process. Saved: kept from forward for "
    "backward. Kept: the same comparison with every process keeping the memory that it has freed, as ours always does."
)


def model_table(own: Sequence[Measurement], kept: Sequence[Measurement] = ()) -> str:
    """Return a case as users would run it, and beside it with every process keeping freed memory."""
    beside = {one.contender: one for one in kept}
    mine = {one.contender: one for one in own}
    rows = []
    for name in {**mine, **beside}:
        cells = _model_cells(mine[name], own) if name in mine else [name, *[""] * 8]
        more = [spread(beside[name]), against(contender(kept, "fast"), beside[name])] if name in beside else ["", ""]
        rows.append(cells + more)
    return table(MODEL_HEADS, rows, lambda row: row[0].split(" (")[0] in OURS)


def _model_cells(one: Measurement, measured: Sequence[Measurement]) -> list[str]:
    """Return the cells of a row except those on kept memory."""
    rates = one.rates if timed(one) else {}
    share = rates.get("share of limit")
    return [
        _named(one),
        spread(one),
        _next_to_baseline(one, measured),
        against(contender(measured, "fast"), one),
        f"{rates['samples/s']:,.2f}" if "samples/s" in rates else "",
        f"{1 / share:.2f} ({share:.0%})" if share else "",
        *(gigabytes(amount) for amount in (one.peak_bytes, one.resident_bytes, one.saved_bytes)),
    ]


def _named(one: Measurement) -> str:
    return f"{one.contender} ({one.note})" if one.note else one.contender


def _next_to_baseline(one: Measurement, measured: Sequence[Measurement]) -> str:
    baseline = next((other for other in measured if other.baseline and timed(other)), None)
    if one.baseline:
        return "baseline"
    return f"{ratio(one, baseline):.2f}" if baseline and timed(one) else ""


def against(fast: Measurement | None, other: Measurement) -> str:
    """Return how many times as fast the fast model is as another contender, in words where it is slower."""
    if fast is None or fast.contender == other.contender or not timed(other):
        return ""
    times = ratio(other, fast)
    return f"slower: {times:.2f} times as slow" if times > SLOWER else f"{1 / times:.2f}"


def scale_of(seconds: float) -> tuple[float, str]:
    """Return the unit that suits a time: its length in seconds, and its name."""
    return (1, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "µs")


def spread(one: Measurement) -> str:
    """Return median, least and greatest of the rounds in one unit."""
    if not timed(one):
        return "not timed"
    size, unit = scale_of(one.median)
    median, low, high = (f"{value / size:,.2f}" for value in (one.median, min(one.seconds), max(one.seconds)))
    return f"{median} {unit} ({low}, {high})"


def gigabytes(amount: int | None) -> str:
    """Return an amount of bytes in GB, empty where it is not known."""
    return "" if amount is None else f"{amount / 1e9:.2f}" if amount >= 1e7 else f"{amount / 1e9:.5f}"


def op_table(cases: Iterable[Sequence[Measurement]], shared: Sequence[str]) -> str:
    """Return every op by every variant, next to its baseline."""
    heads = ("op", "by", "median (from, to)", "x as fast as baseline", "GFLOP/s", "GB/s", "of limit")
    formats = (("GFLOP/s", ",.0f"), ("GB/s", ".1f"), ("share of limit", ".0%"))
    rows = []
    for measured in cases:
        for number, one in enumerate(measured):
            rates = one.rates if timed(one) else {}
            amounts = [format(rates[name], form) if name in rates else "" for name, form in formats]
            case = "" if number else short_title(one, shared) or one.case
            rows.append([case, _named(one), spread(one), _next_to_baseline(one, measured), *amounts])
    return table(heads, rows, lambda row: row[1] in OURS)


def scaling_table(measured: Iterable[Measurement], shared: Sequence[str]) -> str:
    """Return times and memory of a group in which something is varied."""
    heads = ("case", "contender", "median (from, to)", "peak, GB", "process, GB", "saved, GB")
    rows = []
    for one in measured:
        case = ", ".join(words_of(one.case, shared))
        memory = map(gigabytes, (one.peak_bytes, one.resident_bytes, one.saved_bytes))
        rows.append([case, one.contender, spread(one), *memory])
    return table(heads, rows, lambda row: row[1] in OURS)


def prediction_table(predictions: Sequence[Prediction], shared: Sequence[str]) -> str:
    """Return each contender's floor on one GPU next to ours, and how models compare where launches have a price."""
    heads = ["work", "next to", "its floor", "floor of ours", "bound on the speed-up", "memory share of ours"]
    priced = [] if predictions[0].group == "op" else [with_graph, without_graph]
    heads += ["with a graph", "without a graph"][: len(priced)]
    ours = {(one.group, one.case): one for one in predictions if one.contender in PREDICTED_OURS}
    rows = []
    for one in predictions:
        fast = ours.get((one.group, one.case))
        if fast is None or one is fast:
            continue
        parts = [part for part in one.case.split(", ") if part not in shared] or [one.case]
        case = ", ".join(parts if one.group == "op" else [one.group, *parts])
        floors = [f"{1e3 * seconds:,.3f} ms" for seconds in (one.seconds, fast.seconds)]
        bounds = [f"{speedup_bound(one, fast, price):.2f}" for price in priced]
        rows.append(
            [case, one.contender, *floors, f"{speedup_bound(one, fast):.2f}", f"{fast.memory_share:.0%}", *bounds]
        )
    return table(heads, rows, lambda row: False)

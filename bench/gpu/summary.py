"""The results of a visit in words: ten lines for the terminal, and a page in Markdown."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]
Report = Mapping[str, Any]
LINES = 10
CASE = "{}, batch {}, all auxiliary images, bfloat16"
EAGER, CAPTURED = "fast", "fast, captured"
REFERENCE, COMPILED = "reference, SDPA", "reference, SDPA, compiled"
COPY, PRODUCT = "copy, GB/s", "bf16, TFLOP/s"  # names of peaks
SHOWN = 40  # rows of what is wrong, on the page


class Bar(NamedTuple):
    """How many times as fast as a rival a training step has to be; the faster of `ours` counts."""

    preset: str
    batch: int
    ours: tuple[str, ...]
    rival: str
    least: float


BARS = (
    Bar("base", 64, (EAGER, CAPTURED), REFERENCE, 1.3),
    Bar("base", 64, (EAGER, CAPTURED), COMPILED, 1.15),
    Bar("base", 8, (CAPTURED,), REFERENCE, 1.5),
)


def records_of(report: Report, kind: str) -> list[Record]:
    """Return the records of a kind, in the order in which they were found."""
    return [record for part in report["parts"] for record in part["records"] if record["kind"] == kind]


def is_broken(report: Report) -> bool:
    """Return whether something is wrong: a result, an error, or a part that ended without showing anything."""
    wrong = records_of(report, "failure") or [one for one in records_of(report, "check") if not one["ok"]]
    return bool(wrong) or any(not _showed_something(part) for part in report["parts"])


def _showed_something(part: Mapping[str, Any]) -> bool:
    return part["status"] == "done" or (part["status"] == "cut off" and bool(part["records"] or not part["item"]))


def lines(report: Report) -> list[str]:
    """Return at most ten lines: what is broken, what is missing, what is slow."""
    found = [_verdict(report), *_broken(report), *_missing(report)]
    slow = [*_bars(report), *_slow_ops(report), *_floors(report)]
    room = max(LINES - len(slow), 3)
    if len(found) > room:
        found = [*found[: room - 1], f"... and {len(found) - room + 1} lines more on the page"]
    return [*found, *slow][:LINES]


def _verdict(report: Report) -> str:
    checks, failures = records_of(report, "check"), records_of(report, "failure")
    bad = sum(not check["ok"] for check in checks)
    word = "broken" if is_broken(report) else "nothing is broken"
    dry = "dry run, no GPU: " if report["dry_run"] else ""
    return (
        f"{dry}{word}: {len(checks) - bad} checks right, {bad} wrong, {len(failures)} errors, {report['seconds']:.0f} s"
    )


def _broken(report: Report) -> Iterator[str]:
    """Yield a line for each op and backend with wrong results, then one for each part with errors."""
    groups: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for check in records_of(report, "check"):
        if not check["ok"]:
            groups[check["op"], check["backend"]].append(check)
    for (op, backend), wrong in groups.items():
        worst = max(wrong, key=_excess)
        types = ", ".join(sorted({check["types"] for check in wrong}))
        amount = f"{worst['error']:.1e} where {worst['allowed']:.1e} is allowed"
        yield f"broken: {op} by {backend} in {types}: {len(wrong)} cases, worst {worst['what']}: {amount}"
    for part in report["parts"]:
        failures = [record for record in part["records"] if record["kind"] == "failure"]
        if failures:
            more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            yield f"broken: {part['name']}: {failures[0]['what']}: {_short(failures[0]['error'])}{more}"
        elif not _showed_something(part):
            yield f"broken: {part['name']}: {part['status']} without a result{_where(part)}"


def _missing(report: Report) -> Iterator[str]:
    cut = [f"{part['name']}{_where(part)}" for part in report["parts"] if part["status"] == "cut off"]
    if cut:
        yield f"cut off, the time was up: {'; '.join(cut[:4])}{f' and {len(cut) - 4} more' if len(cut) > 4 else ''}"
    skipped = Counter(f"{record['what']}: {record['reason']}" for record in records_of(report, "skipped"))
    if skipped:
        first, *rest = skipped
        yield f"skipped: {first}{f' and {len(rest)} more' if rest else ''}"


def _bars(report: Report) -> Iterator[str]:
    for preset, batch, ours, rival, least in BARS:
        times = medians(report, CASE.format(preset, batch))
        known = [times[name] for name in ours if name in times]
        name = " or ".join(ours)
        if not known or rival not in times:
            yield f"not measured: step of {preset}, batch {batch}: {name} against {rival}, at least {least:.2f}"
            continue
        ratio = times[rival] / min(known)
        word = "reached" if ratio >= least else "slow"
        yield f"{word}: step of {preset}, batch {batch}: {name} {ratio:.2f} times as fast as {rival}, bar {least:.2f}"


def _slow_ops(report: Report) -> Iterator[str]:
    slow = [(ratio, f"{case}: {ours} {ratio:.2f}") for case, ours, ratio in _op_ratios(report) if ratio < 1]
    if slow:
        shown = "; ".join(text for _, text in sorted(slow)[:3])
        yield f"slow: {len(slow)} ops behind PyTorch's: {shown}"


def _op_ratios(report: Report) -> Iterator[tuple[str, str, float]]:
    """Yield case, implementation, and how many times as fast as PyTorch's it is on the device."""
    for case, measured in _cases(report, "op").items():
        baseline = next((one for one in measured if one["baseline"]), None)
        for one in measured if baseline else ():
            if one is not baseline:
                yield case, one["contender"], _median(baseline) / _median(one)


def _floors(report: Report) -> Iterator[str]:
    case = CASE.format("base", 64)
    floor, times = floors(report).get((case, EAGER)), medians(report, case)
    known = {name: times[name] for name in (EAGER, CAPTURED) if name in times}
    if floor and known:
        name = min(known, key=lambda name: known[name])
        ratio = known[name] / floor
        yield f"floor: step of base, batch 64: {name} takes {ratio:.2f} times its floor of {1e3 * floor:.1f} ms"


def floors(report: Report) -> dict[tuple[str, str], float]:
    """Return the least seconds of a step by case and contender: of each operator the products or the bytes."""
    peaks = [fact["value"] for fact in records_of(report, "fact") if fact["name"] == "peaks"]
    if not peaks:
        return {}
    speed = {name: max(found[name] for found in peaks) for name in (COPY, PRODUCT)}
    return {
        (CASE.format(*counts["task"].split(", batch ")), counts["contender"]): sum(
            times * max(2 * macs / (1e12 * speed[PRODUCT]), moved / (1e9 * speed[COPY]))
            for macs, moved, times in counts["operators"]
        )
        for counts in records_of(report, "counts")
    }


def medians(report: Report, case: str) -> dict[str, float]:
    """Return the median seconds of each contender of a case's training step; the last measurement counts."""
    return {one["contender"]: _median(one) for one in _cases(report, "training step").get(case, ())}


def _cases(report: Report, group: str) -> dict[str, list[Record]]:
    """Return the measurements of a group by case, the last of each contender."""
    found: defaultdict[str, dict[str, Record]] = defaultdict(dict)
    for one in records_of(report, "measurement"):
        if one["group"] == group and one["seconds"]:
            found[one["case"]][one["contender"]] = one
    return {case: list(by_contender.values()) for case, by_contender in found.items()}


def page(report: Report) -> str:
    """Return everything that was found, in Markdown."""
    sections = {
        "In ten lines": "\n".join(f"- {line}" for line in lines(report)),
        "Machine": _facts(report),
        "Parts": _table(
            ("part", "status", "s", "records"),
            (
                (part["name"], part["status"] + _where(part), part["seconds"], len(part["records"]))
                for part in report["parts"]
            ),
        ),
        "Errors": _errors(report),
        "Wrong results": _wrong(report),
        "Checks": _checks(report),
        "Training steps": _steps(report, "training step"),
        "Encoding": _steps(report, "encoding"),
        "Ops": _ops(report),
        "Counts": _counts(report),
        "Kernels": _kernels(report),
    }
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in sections.items() if content)
    return f"# A visit to a GPU, {report.get('started', '')}\n\n{text}\n"


def _facts(report: Report) -> str:
    rows = []
    for fact in records_of(report, "fact"):
        value = fact["value"]
        rows.append(f"- {fact['name']}: {value if isinstance(value, (str, int, float)) else json.dumps(value)}")
    return "\n".join(rows)


def _errors(report: Report) -> str:
    parts = [
        f"**{part['name']}: {failure['what']}**: {failure['error']}\n\n```\n{failure.get('where', '').strip()}\n```"
        for part in report["parts"]
        for failure in part["records"]
        if failure["kind"] == "failure"
    ]
    parts += [
        f"**{part['name']}: {part['status']}**\n\n```\n{part['log'].strip()[-1500:]}\n```"
        for part in report["parts"]
        if part["status"] in ("failed", "cut off") and part["log"].strip()
    ]
    return "\n\n".join(parts)


def _wrong(report: Report) -> str:
    wrong = sorted((check for check in records_of(report, "check") if not check["ok"]), key=lambda one: -_excess(one))
    rows = [
        (
            check["what"],
            check["backend"],
            check["types"],
            check["result"],
            f"{check['error']:.2e}",
            f"{check['allowed']:.2e}",
        )
        for check in wrong[:SHOWN]
    ]
    more = f"\n\n{len(wrong) - SHOWN} more are in the JSON file." if len(wrong) > SHOWN else ""
    return _table(("case", "backend", "types", "result", "error", "allowed"), rows) + more


def _checks(report: Report) -> str:
    """Return for each op, backend and type the number of cases and the greatest share of what is allowed."""
    groups: defaultdict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for check in records_of(report, "check"):
        groups[check["op"], check["backend"], check["types"]].append(check)
    rows = [
        (*key, len(checks), sum(not check["ok"] for check in checks), f"{max(map(_excess, checks)):.2f}")
        for key, checks in groups.items()
    ]
    return _table(("op", "backend", "types", "cases", "wrong", "error over allowed, largest"), rows)


def _steps(report: Report, group: str) -> str:
    least = floors(report)
    rows = []
    for case, measured in _cases(report, group).items():
        times = {one["contender"]: _median(one) for one in measured}
        for one in measured:
            name = one["contender"]
            floor = least.get((case, EAGER if name == CAPTURED else REFERENCE if name == COMPILED else name))
            rows.append(
                (
                    case,
                    name,
                    f"{1e3 * times[name]:.2f}",
                    f"{1e3 * min(one['seconds']):.2f} to {1e3 * max(one['seconds']):.2f}",
                    f"{times[REFERENCE] / times[name]:.2f}" if REFERENCE in times else "",
                    f"{one['peak_bytes'] / 1e9:.2f}" if one["peak_bytes"] else "",
                    f"{1e3 * floor:.2f}" if floor else "",
                    f"{100 * floor / times[name]:.0f} %" if floor else "",
                )
            )
    heads = (
        "case",
        "contender",
        "ms",
        "range",
        "times as fast as the reference",
        "peak GB",
        "floor ms",
        "share of floor",
    )
    return _table(heads, rows)


def _ops(report: Report) -> str:
    rows = []
    for case, measured in _cases(report, "op").items():
        baseline = next((one for one in measured if one["baseline"]), None)
        for one in measured:
            rows.append(
                (
                    case,
                    one["contender"],
                    f"{1e3 * _median(one):.4f}",
                    f"{_median(baseline) / _median(one):.2f}" if baseline else "",
                    f"{100 * one['limit'] / _median(one):.0f} %" if one["limit"] else "",
                    f"{1e3 * one['with_host']:.4f}",
                    one["note"],
                )
            )
    heads = ("case", "by", "ms on the device", "times as fast", "share of the limit", "ms with the host", "note")
    return _table(heads, rows)


def _counts(report: Report) -> str:
    rows = (
        (
            one["task"],
            one["contender"],
            f"{one['macs'] / 1e9:.1f}",
            f"{one['bytes'] / 1e9:.2f}",
            one["launches"],
            one["casts"],
        )
        for one in records_of(report, "counts")
    )
    return _table(("step", "contender", "GMAC", "GB", "launches", "casts"), rows)


def _kernels(report: Report) -> str:
    parts = []
    for found in records_of(report, "kernels"):
        total = found["total"]
        head = (
            f"**{found['contender']}: {found['case']}**: {1e3 * total['seconds']:.2f} ms in {total['launches']:.0f} "
            f"launches; matrix products {100 * total['products']:.0f} %, attention {100 * total['attention']:.0f} %"
        )
        rows = (
            (f"`{row['kernel'][:100]}`", f"{1e3 * row['seconds']:.3f}", f"{row['launches']:.0f}")
            for row in found["top"]
        )
        parts.append(f"{head}\n\n{_table(('kernel', 'ms', 'launches'), rows)}")
    return "\n\n".join(parts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table, or nothing without rows."""
    rows = list(rows)
    lines = [heads, ["---"] * len(heads), *rows] if rows else []
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |" for cells in lines)


def _where(part: Mapping[str, Any]) -> str:
    return f" in {part['item']}" if part["status"] in ("cut off", "failed") and part["item"] else ""


def _short(error: str) -> str:
    first = error.partition("\n")[0]
    return first if len(first) <= 160 else f"{first[:157]}..."


def _excess(check: Record) -> float:
    if math.isnan(check["error"]):
        return math.inf
    return check["error"] / check["allowed"] if check["allowed"] else (math.inf if check["error"] else 0.0)


def _median(measured: Record | None) -> float:
    return statistics.median(measured["seconds"]) if measured else math.nan

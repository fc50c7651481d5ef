"""The end of a run: tables on the terminal and, if times were taken, a JSON file and a page in `bench/runs/`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

import bench.results
from bench.page import render
from bench.page_tables import slower, title_of
from bench.predictions import predict
from bench.results import Measurement, Results
from bench.suite import Suite

WIDTH = 126


def finish(reporter: pytest.TerminalReporter, suite: Suite) -> None:
    """Print what was found, and keep it in files if times were taken."""
    tables = [*budget_tables(suite), *time_tables(suite.measurements)]
    reporter.write("\n".join(map(printed, tables)))
    for measured in bench.results.by_case(suite.measurements).values():
        for sentence in slower(measured, title_of(measured[0])):
            reporter.write_line(f"slower: {sentence}")
    if not suite.measurements:
        return
    results = gather(suite)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    limits = ", ".join(f"{name} {amount:,.0f}" for name, amount in results.limits.items())
    reporter.write_line(f"{results.machine['cpu']}, {results.machine['threads']} threads{load}, {limits}")
    for path in keep(results, suite.options.results):
        reporter.write_line(f"kept in {os.path.relpath(path)}")


def gather(suite: Suite) -> Results:
    """Return the run's results, with all that a later reader needs to understand them."""
    speeds, options = suite.speeds, suite.options
    return Results(
        date=bench.results.today(),
        commit=bench.results.commit(),
        machine=bench.results.machine(),
        versions=bench.results.versions(),
        options={name: value for name, value in options._asdict().items() if name != "results"},
        limits={"copy_gb_s": speeds["copy"] / 1e9, "gemm_gflop_s": speeds["gemm"] / 1e9} if speeds else {},
        measurements=suite.measurements,
        profiles={preset: report.to_dict() for preset, report in suite.reports.items()},
        predictions=predict() if options.full else [],
    )


def keep(results: Results, folder: Path) -> list[Path]:
    """Write the JSON file and the page beside it, each under a temporary name first, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{results.name}.json", folder / f"{results.name}.html"]
    for path, text in zip(paths, (results.to_json(), render(results)), strict=True):
        part = path.with_name(f".{path.name}.part")
        part.write_text(text)
        part.replace(path)
    return paths


def printed(table: Table) -> str:
    """Return a table as text."""
    page = io.StringIO()
    Console(file=page, width=WIDTH).print(table)
    return page.getvalue()


def table_of(title: str, words: int, *heads: str) -> Table:
    """Return an empty table whose first columns hold words, the others numbers."""
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < words else "right")
    return table


def budget_tables(suite: Suite) -> Iterable[Table]:
    """Yield a table of the presets' cost reports, then one a preset of what a training step saves for backward."""
    if suite.reports:
        title = "one sample, forward, counted like fvcore: one multiply-add is one FLOP"
        heads = ("M parameters", "encoder GMAC", "encoder GFLOP (2x)", "pretraining GMAC", "MB moved", "launches")
        table = table_of(title, 1, "preset", *heads, "budget")
        for preset, report in suite.reports.items():
            total, macs = report.pretraining.total, report.encoder.total.macs
            amounts = [f"{total.parameters / 1e6:.2f}", f"{macs / 1e9:.2f}", f"{2 * macs / 1e9:.2f}"]
            amounts += [f"{total.macs / 1e9:.2f}", f"{total.bytes / 1e6:,.1f}", f"{total.launches:,}"]
            table.add_row(preset, *amounts, report.standing.split(",")[0].split(":")[0])
        yield table
    for preset, step in suite.steps.items():
        columns = ("saved MB", "of reference sdpa", "of reference eager", "launches")
        table = table_of(f"training step of {preset}, all auxiliary images, counted", 1, "model", *columns)
        for name, cost in step.items():
            shares = [cost.saved_bytes / step[f"reference {kind}"].saved_bytes for kind in ("sdpa", "eager")]
            amounts = [f"{cost.saved_bytes / 1e6:,.1f}", *(f"{share:.3f}" for share in shares), f"{cost.launches:,}"]
            table.add_row(name, *amounts)
        yield table


def time_tables(measurements: Sequence[Measurement]) -> Iterable[Table]:
    """Yield a table of all ops, then one a comparison of models, then one for each thing that was varied."""
    cases = bench.results.by_case(measurements)
    ops = [measured for (group, _, _), measured in cases.items() if group == "op"]
    if ops:
        yield op_table(ops)
    for (group, _, _), measured in cases.items():
        if group != "op" and measured[0].x is None:
            yield model_table(title_of(measured[0]), measured)
    varied = [measurement for measurement in measurements if measurement.x is not None]
    for group in dict.fromkeys(measurement.group for measurement in varied):
        yield scaling_table(group, [measurement for measurement in varied if measurement.group == group])


def op_table(cases: Iterable[Sequence[Measurement]]) -> Table:
    """Return the times of ops; a ratio above 1 means faster than the case's first line."""
    heads = ("median, ms", "times as fast", "GFLOP/s", "GB/s", "of limit")
    table = table_of("ops, forward and backward where trained", 2, "op", "by", *heads)
    for measured in cases:
        for number, one in enumerate(measured):
            rates = one.rates
            table.add_row(
                "" if number else one.case,
                one.contender,
                f"{1e3 * one.median:,.2f}",
                "1" if one.baseline else f"{bench.results.ratio(one, measured[0]):.2f}",
                f"{rates['GFLOP/s']:,.0f}" if "GFLOP/s" in rates else "",
                f"{rates['GB/s']:.1f}",
                f"{rates['share of limit']:.0%}",
            )
    return table


def model_table(title: str, measured: Sequence[Measurement]) -> Table:
    """Return the times and memory of models, with the fast model's speed-up over each of the others."""
    heads = ("median, s", "from", "to", "fast is x as fast", "samples/s", "peak MB", "process MB", "saved MB", "GMAC")
    table = table_of(title, 1, "model", *heads)
    fast = next((one for one in measured if one.contender == "fast"), None)
    for one in measured:
        times = "" if fast in (None, one) else f"{bench.results.ratio(fast, one):.2f}"
        table.add_row(
            one.contender,
            *(f"{seconds:.3f}" for seconds in (one.median, min(one.seconds), max(one.seconds))),
            times,
            f"{one.rates['samples/s']:.2f}",
            *(_scaled(amount, 1e6) for amount in (one.peak_bytes, one.resident_bytes, one.saved_bytes)),
            _scaled(one.macs, 1e9),
        )
    if fast is not None and fast.gemms and fast.limit:
        table.caption = (
            f"fast takes {fast.median / fast.gemms:.2f} times as long as the GEMMs of its linear layers alone, "
            f"{fast.median / fast.limit:.2f} times as long as all its matrix products"
        )
        table.caption_justify = "left"
    return table


def scaling_table(group: str, measured: Sequence[Measurement]) -> Table:
    """Return time and memory against what is varied, with the exponent that fits where it is a size."""
    heads = ("median, s", "process MB", "peak MB", "saved MB", "fast is x as fast")
    table = table_of(f"training step, {group} varied", 2, "case", "model", *heads)
    for one in measured:
        fast = next((other for other in measured if (other.case, other.contender) == (one.case, "fast")), None)
        table.add_row(
            one.case,
            one.contender,
            f"{one.median:.3f}",
            *(_scaled(amount, 1e6) for amount in (one.resident_bytes, one.peak_bytes, one.saved_bytes)),
            "" if fast in (None, one) else f"{bench.results.ratio(fast, one):.2f}",
        )
    fits = [f"{name} {fit:.2f}" for name, fit in exponents(measured).items()]
    if fits:
        table.caption = f"time grows with the number to the power of: {', '.join(fits)}"
        table.caption_justify = "left"
    return table


def exponents(measured: Sequence[Measurement]) -> dict[str, float]:
    """Return, by contender, the power of `x` that time grows with, where there are three positive x or more."""
    fits = {}
    for contender in dict.fromkeys(one.contender for one in measured):
        points = [one for one in measured if one.contender == contender and one.x and one.seconds]
        if len(points) >= 3:
            fits[contender] = bench.results.exponent([(one.x or 0.0, one.median) for one in points])
    return fits


def _scaled(amount: float | None, size: float) -> str:
    return "" if amount is None else f"{amount / size:,.0f}"

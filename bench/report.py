"""The end of a run: tables on the terminal, and with times a JSON file and a page in `bench/results/`."""

from __future__ import annotations

from pytest import TerminalReporter


def finish(terminalreporter, options, found):
    for m in found.measurements:
        terminalreporter.write_line(f"{m.group} | {m.case} | {m.contender} | {m.median:.4f} | {m.rates}")

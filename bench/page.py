"""A run of the bench suite as one HTML page that needs nothing from elsewhere.

python -m bench.page RESULTS.json [OUT.html]
"""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.page_plots import number_ids
from bench.page_sections import (
    digits,
    limits_of,
    macs_section,
    model_section,
    op_section,
    predicted_section,
    roofline_section,
    scaling_section,
)
from bench.page_tables import OURS, SLOWER, contender, scale_of, timed
from bench.results import Measurement, Results, by_case, ratio
from mmmae.cost.page import STYLE

LOOK = """
body { max-width: 70rem; } section { scroll-margin-top: 1rem; }
.answer { font-size: 1.15rem; margin: .8rem 0; } .answer b { font-weight: 650; }
nav { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; margin: 1rem 0; }
nav ul { list-style: none; margin: 0; padding: 0; } nav > ul { display: flex; flex-wrap: wrap; gap: .1rem 1.5rem; }
nav > ul > li:has(ul) { flex-basis: 100%; } nav ul ul { display: inline; }
nav ul ul li { display: inline-block; margin-left: .9rem; font-size: .87rem; }
a { color: var(--link); } :root { --link: #2563c4; --ours: #3f7fdc; }
@media (prefers-color-scheme: dark) { :root { --link: #82b1ff; } }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .8rem 1.2rem;
  align-items: start; margin: .8rem 0; }
.plot { overflow-x: auto; margin: 0; } .wide { grid-column: 1 / -1; }
.plot svg { height: auto; background: none; } .wide svg { min-width: 44rem; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--ink); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { color: var(--soft); }
dd { margin: 0; } tr:last-child td { font-weight: inherit; } td { white-space: nowrap; }
th { vertical-align: bottom; } th, td { padding: .25rem .4rem; }
tr.ours td, tr.ours:last-child td { font-weight: 600; } tr.ours td:first-child { box-shadow: inset 3px 0 var(--ours); }
td:first-child, th:first-child { padding-left: .6rem; }
h3 { font-size: .98rem; margin: 1.6rem 0 .3rem; scroll-margin-top: 1rem; }
summary { cursor: pointer; color: var(--soft); margin: .4rem 0; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; background: var(--ours); }
.slower { color: var(--bad); } ul.slower { margin: .4rem 0; }
.predicted { background: var(--track); border: 2px dashed var(--soft); border-radius: 6px; padding: 0 1rem 1rem;
  margin-top: 2.5rem; }
"""
READING = (
    "Times are medians of rounds; whiskers, and brackets in tables, reach from the least to the greatest. The "
    "contenders of a case ran in turn, once each a round, so that a slow moment of the machine hit all of them. "
    "1.18 x says: takes 1.18 times as much as ours; below 1, in red, ours is the slower."
)


def render(results: Results) -> str:
    """Return the page; sections without data are left out."""
    ops = [one for one in results.measurements if one.group == "op"]
    models = [one for one in results.measurements if one.group != "op" and one.x is None]
    varied = [one for one in results.measurements if one.group != "op" and one.x is not None]
    sections = {
        "Models": model_section(models),
        "Ops": op_section(ops),
        "Roofline": roofline_section([one for one in ops if one.dtype == ops[0].dtype], results.limits),
        "Scaling": scaling_section(varied),
        "Multiply-adds": macs_section(results.profiles),
        "Predictions for GPUs": predicted_section(results.predictions),
        "The run": run_section(results),
    }
    sections = {title: content for title, content in sections.items() if content}
    body = "\n".join(
        f'<section id="{_anchor(title)}"{_kind(title)}><h2>{title}</h2>{content}</section>'
        for title, content in sections.items()
    )
    title = html.escape(f"mmmae bench, {results.date[:10]}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}{LOOK}</style></head><body>\n'
        f"<h1>{title}</h1>{answer(models, results.machine)}{contents(sections)}"
        f'<p class="soft">{READING}</p>\n{number_ids(body)}</body></html>\n'
    )


def answer(models: Sequence[Measurement], machine: Mapping[str, Any]) -> str:
    """Return a sentence on how fast ours trains `base`, or does the first task, next to the others, and where."""
    cases = [case for case in by_case(models).values() if contender(case, "fast") and _others(case)]
    cases.sort(key=lambda case: (case[0].group, case[0].case.split(", ")[0]) != ("training step", "base"))
    if not cases:
        return ""
    case = cases[0]
    fast = contender(case, "fast")
    assert fast is not None
    preset, *more = fast.case.split(", ")
    first, *rest = _others(case)
    place = ", ".join(str(machine[field]) for field in ("cpu", "gpu") if machine.get(field)) or "this machine"
    size, unit = scale_of(fast.median)
    work = f"On {place}, {'encoding' if fast.group == 'encoding' else 'a training step'} of {preset}"
    text = (
        f"{html.escape(work)} takes {digits(fast.median / size)} {unit}: <b>{_times(fast, first)} {_name(first)}</b>."
    )
    if rest:
        text += f" Against the others: {', '.join(f'{_name(one)} {ratio(fast, one):.2f}' for one in rest)}."
    memory = [f"peak memory {fast.peak_bytes / 1e9:.2f} GB"] if fast.peak_bytes else []
    dtype = [fast.dtype] if fast.dtype not in more else []
    where = ", ".join(
        [*more, *dtype, f"median of {len(fast.seconds)} rounds", *memory, _machine({**machine, "cpu": "", "gpu": ""})]
    )
    return f'<p class="answer">{text}</p><p class="soft">{html.escape(where)}.</p>'


def _others(case: Iterable[Measurement]) -> list[Measurement]:
    """Return the contenders that ours is compared with, the baseline first."""
    return sorted((one for one in case if timed(one) and one.contender not in OURS), key=lambda one: not one.baseline)


def _times(ours: Measurement, other: Measurement) -> str:
    times = ratio(ours, other)
    return f"{times:.2f} times as fast as" if 1 / times <= SLOWER else f"{1 / times:.2f} times as slow as"


def _name(one: Measurement) -> str:
    """Return a contender as it is called in a sentence."""
    names = {
        "reference, SDPA": "the reference with SDPA",
        "reference, plain": "the plain reference",
        "reference, SDPA, compiled": "the compiled reference",
    }
    return html.escape(names.get(one.contender, one.contender.removesuffix(", SDPA")))


def contents(sections: Mapping[str, str]) -> str:
    """Return links to the sections and to the headings in them."""
    items = ""
    for title, content in sections.items():
        inner = "".join(f'<li><a href="#{anchor}">{text}</a></li>' for anchor, text in HEADING.findall(content))
        items += f'<li><a href="#{_anchor(title)}">{title}</a>{f"<ul>{inner}</ul>" if inner else ""}</li>'
    return f"<nav><ul>{items}</ul></nav>"


HEADING = re.compile(r'<h3 id="([^"]*)">(.*?)</h3>')


def run_section(results: Results) -> str:
    """Return who measured what, on which machine, and how to read it."""
    copy, gemm = limits_of(results.limits)
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
    return f"<dl>{lines}</dl>"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _kind(title: str) -> str:
    return ' class="predicted"' if title.startswith("Predictions") else ""


def _listed(values: Mapping[str, Any]) -> str:
    """Return names and values in a line, without those that are not set."""
    shown = {name.replace("_", " "): value for name, value in values.items() if value not in (None, False, "")}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in shown.items())


def _machine(machine: Mapping[str, Any]) -> str:
    """Return the machine in words."""
    units = {"cpu": "", "gpu": "", "cores": " cores", "threads": " threads", "memory_gb": " GB", "system": ""}
    return ", ".join(f"{machine[field]}{unit}" for field, unit in units.items() if machine.get(field))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
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

"""The cost report as an HTML page, with stacked bars above tables, light or dark as the reader's system is."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .budget import Range
from .table import CostTable, Row

MEASURES = {"parameters": "parameters", "macs": "multiply-adds", "bytes": "bytes moved", "launches": "launches"}
BAR_WIDTH = 1000  # in units of the drawing
COLOURS = {  # of a component, or of all components whose names begin with it and a point
    "masking": "#8b93a1",
    "patch_embed": "#1f9fb5",
    "aux_encoders": "#e0912f",
    "conditioning": "#9a6fd0",
    "blocks": "#3f7fdc",
    "decoder": "#35a06b",
    "loss": "#d64f63",
    "contrastive": "#c9a227",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5c6675; --paper: #ffffff; --line: #d9dee6; --track: #eef1f5;
  --good: #1d7f4f; --bad: #b3341f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b5; --paper: #14181f; --line: #323a47;
  --track: #222934; --good: #58c98f; --bad: #ff8a73; } }
body { margin: 2rem auto; max-width: 64rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; } p { margin: .4rem 0; }
.answer { font-size: 1.15rem; margin: .3rem 0 .8rem; }
.soft, figcaption { color: var(--soft); font-size: .87rem; } figure { margin: .5rem 0; }
.budget { border-left: 4px solid var(--line); padding-left: .8rem; margin: 1rem 0; }
.good { border-color: var(--good); } .bad { border-color: var(--bad); }
.bar { display: grid; grid-template-columns: 7rem 1fr 7.5rem; gap: .2rem .8rem; align-items: center; margin: .25rem 0; }
.bar b { font-weight: 600; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.gauge { align-items: start; margin: .6rem 0; }
.scale { position: relative; height: 22px; margin-bottom: 1.3rem; border-radius: 3px; background: var(--track); }
.scale i { position: absolute; top: 0; height: 22px; } .scale .limits { background: var(--good); opacity: .3; }
.scale .mark { width: 4px; margin-left: -2px; background: var(--ink); }
.scale small { position: absolute; top: 24px; transform: translateX(-50%); color: var(--soft); font-size: .8rem;
  white-space: nowrap; }
.scale small:first-of-type { transform: none; }
svg { display: block; width: 100%; height: 22px; border-radius: 3px; background: var(--track); }
svg rect { stroke: var(--paper); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .6rem 0; list-style: none; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
tr:last-child td { font-weight: 600; border-bottom: 0; }
@media (max-width: 40rem) { body { margin-top: 1rem; } .bar { grid-template-columns: 1fr auto; margin: .6rem 0; }
  .bar > :nth-child(2) { grid-row: 2; grid-column: 1 / 3; }
  table { font-size: .69rem; } th, td { padding: .2rem .12rem; } th:nth-child(4), td:nth-child(4) { display: none; } }
"""


def render(
    title: str,
    answer: str,
    notes: Sequence[str],
    tone: str,
    gauges: Sequence[tuple[Range, float]],
    tables: Sequence[tuple[CostTable, list[list[str]]]],
) -> str:
    """Return the page.

    Args:
        title: what was counted.
        answer: the main figures in one line.
        notes: sentences on how the figures were counted, the last on the budget; text in backquotes is set as code.
        tone: colour of the sentence on the budget: "good", "plain" or "bad".
        gauges: ranges of figures that have a budget, with the values.
        tables: costs, each with its cells as text: the head, a row for each component, and the total.
    """
    *counting, budget = notes
    title = html.escape(title.replace("`", ""))
    body = [
        f'<h1>{title}</h1><p class="answer">{_prose(answer)}</p>',
        f'<div class="budget {tone}"><p>{_prose(budget)}</p>',
        *(_gauge(limits, value) for limits, value in gauges),
        "</div>",
        *(_section(table, cells) for table, cells in tables),
        "<h2>How it is counted</h2>",
        *(f'<p class="soft">{_prose(note)}</p>' for note in counting),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n'
    return page + "\n".join(body) + "\n</body></html>\n"


def render_fragment(
    title: str, answer: str, notes: Sequence[str], tables: Sequence[tuple[CostTable, list[list[str]]]]
) -> str:
    """Return title, tables and notes without style, for a notebook, which has its own; arguments as of `render`."""
    body = [f"<h3>{_prose(title)}</h3><p>{_prose(answer)}</p>"]
    body += [f"<h4>{html.escape(table.title)}</h4>{_table(cells)}" for table, cells in tables]
    body += [f"<p>{_prose(note)}</p>" for note in notes]
    return "\n".join(body)


def _section(table: CostTable, cells: list[list[str]]) -> str:
    bars = "".join(_bar(table, field, name) for field, name in MEASURES.items())
    legend = "".join(
        f'<li><i style="background:{colour};opacity:{opacity}"></i>{html.escape(component)}</li>'
        for component, (colour, opacity) in _paints(table).items()
    )
    return (
        f"<h2>{html.escape(table.title)}</h2><figure>{bars}<ul class='legend soft'>{legend}</ul></figure>"
        f'<div class="scroll">{_table(cells)}</div>'
    )


def _table(cells: list[list[str]]) -> str:
    head, *rows = cells
    return f"<table>{_line('th', head)}{''.join(_line('td', row) for row in rows)}</table>"


def _bar(table: CostTable, field: str, name: str) -> str:
    total = getattr(table.total, field)
    paints = _paints(table)
    left, pieces = 0.0, []
    for row in table.rows:
        width = BAR_WIDTH * getattr(row, field) / max(total, 1)
        if width > 0:
            colour, opacity = paints[row.component]
            pieces.append(
                f'<rect x="{left:.2f}" width="{width:.2f}" height="22" fill="{colour}" fill-opacity="{opacity}">'
                f"<title>{html.escape(_tip(row, field, total))}</title></rect>"
            )
        left += width
    return f'<div class="bar"><span>{name}</span>{_drawing("".join(pieces), name)}<b>{_amount(total, field)}</b></div>'


def _gauge(limits: Range, value: float) -> str:
    """Draw the value on a scale from 0, with the allowed range and its limits."""
    end = 1.25 * max(limits.high, value)
    low, high, mark = (100 * amount / end for amount in (limits.low, limits.high, value))
    allowed = f"{limits.low / limits.scale:g} to {limits.high / limits.scale:g} {limits.unit}"
    amount = f"{value / limits.scale:.2f} {limits.unit}"
    label = f"{limits.figure}: {amount}, the budget is {allowed}"
    drawing = (
        f'<i class="limits" style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
        f'<i class="mark" style="left:{mark:.1f}%"></i>'
        f'<small>0</small><small style="left:{(low + high) / 2:.1f}%">{allowed}</small>'
    )
    scale = f'<div class="scale" role="img" aria-label="{html.escape(label)}">{drawing}</div>'
    return f'<div class="bar gauge"><span>{limits.figure}</span>{scale}<b>{amount}</b></div>'


def _drawing(content: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {BAR_WIDTH} 22" preserveAspectRatio="none" role="img" aria-label="{html.escape(label)}">'
        f"{content}</svg>"
    )


def _paints(table: CostTable) -> dict[str, tuple[str, float]]:
    """Return colour and opacity of each component; the members of a group fade."""
    members: dict[str, int] = {}
    paints = {}
    for row in table.rows:
        group = row.component.split(".")[0]
        paints[row.component] = (COLOURS[group], round(max(1 - 0.25 * members.get(group, 0), 0.25), 2))
        members[group] = members.get(group, 0) + 1
    return paints


def _tip(row: Row, field: str, total: int) -> str:
    amount = getattr(row, field)
    return f"{row.component}: {_amount(amount, field)}, {amount / total:.1%}"


def _amount(value: int, field: str) -> str:
    if field == "launches":
        return f"{value:,}"
    size, name = {"parameters": (1e6, "M"), "macs": (1e9, "GMAC"), "bytes": (1e6, "MB")}[field]
    return f"{value / size:,.2f} {name}"


def _line(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _prose(text: str) -> str:
    """Escape text, and set what stands between backquotes as code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))

"""A report as one HTML page: the costs as stacked bars, tables under them, in the reader's light or dark colours."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .budget import Range
from .table import CostTable, Row

MEASURES = {"parameters": "parameters", "macs": "multiply-adds", "bytes": "bytes moved", "launches": "launches"}
BAR_WIDTH = 1000  # of the drawing's own units
COLOURS = {  # of a component, or of all whose names begin with it and a point
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
.soft, figcaption { color: var(--soft); font-size: .87rem; } figure { margin: .5rem 0; }
.verdict { border-left: 4px solid; padding-left: .8rem; } .good { border-color: var(--good); }
.bad { border-color: var(--bad); }
.bar { display: grid; grid-template-columns: 7rem 1fr 7.5rem; gap: .8rem; align-items: center; margin: .25rem 0; }
.bar b { font-weight: 600; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: 22px; border-radius: 3px; background: var(--track); }
svg rect { stroke: var(--paper); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.limits { fill: var(--good); fill-opacity: .3; } .mark { fill: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .6rem 0; list-style: none; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
tr:last-child td { font-weight: 600; border-bottom: 0; }
"""


def render(
    title: str,
    verdict: str,
    within_budget: bool,
    gauges: Sequence[tuple[Range, float]],
    tables: Sequence[tuple[CostTable, list[list[str]]]],
    notes: Sequence[str],
) -> str:
    """Return the page.

    Args:
        title: what was counted.
        verdict: a sentence on the budget, in red unless `within_budget`.
        gauges: figures that have a budget, with their values.
        tables: costs, each with its cells as text: the head, a row a component, the total.
        notes: what a reader of the figures has to know; text between backquotes is set as code.
    """
    title = html.escape(title.replace("`", ""))
    body = [
        f"<h1>{title}</h1>",
        f'<p class="verdict {"good" if within_budget else "bad"}">{_prose(verdict)}</p>',
        *(_gauge(limits, value) for limits, value in gauges),
        *(_section(table, cells) for table, cells in tables),
        *(f'<p class="soft">{_prose(note)}</p>' for note in notes),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n'
    return page + "\n".join(body) + "\n</body></html>\n"


def _section(table: CostTable, cells: list[list[str]]) -> str:
    bars = "".join(_bar(table, field, name) for field, name in MEASURES.items())
    legend = "".join(
        f'<li><i style="background:{colour};opacity:{opacity}"></i>{html.escape(component)}</li>'
        for component, (colour, opacity) in _paints(table).items()
    )
    head, *rows = cells
    lines = [_line("th", head), *(_line("td", row) for row in rows)]
    return (
        f"<h2>{html.escape(table.title)}</h2><figure>{bars}<ul class='legend soft'>{legend}</ul></figure>"
        f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    )


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
    """The value on a scale that begins at 0, over the stretch where it may be."""
    unit = BAR_WIDTH / (1.25 * max(limits.high, value))
    low, width = limits.low * unit, (limits.high - limits.low) * unit
    stretch = f'<rect class="limits" x="{low:.2f}" width="{width:.2f}" height="22"/>'
    mark = f'<rect class="mark" x="{value * unit - 2:.2f}" width="4" height="22"/>'
    amount = f"{value / limits.scale:.2f} {limits.unit}"
    allowed = f"{limits.low / limits.scale:g} to {limits.high / limits.scale:g} {limits.unit} is within budget"
    drawing = _drawing(f"<title>{allowed}</title>{stretch}{mark}", f"{limits.figure}: {amount}, {allowed}")
    return f'<div class="bar"><span>{limits.figure}</span>{drawing}<b>{amount}</b></div>'


def _drawing(content: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {BAR_WIDTH} 22" preserveAspectRatio="none" role="img" aria-label="{html.escape(label)}">'
        f"{content}</svg>"
    )


def _paints(table: CostTable) -> dict[str, tuple[str, float]]:
    """Colour and opacity of each component; members of one group fade."""
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
    """Escaped, with what stands between backquotes as code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))

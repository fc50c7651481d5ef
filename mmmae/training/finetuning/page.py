"""The report of a fine-tuning run, or of several seeds, as one HTML page that holds its pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import write_atomically
from ...text import printable

TITLES = {
    "accuracy": "overall accuracy (OA)",
    "average_accuracy": "average accuracy (AA)",
    "kappa": "Cohen's kappa",
    "f1_macro": "F1, mean over classes",
    "miou": "IoU, mean over classes (mIoU)",
}
CLASS_TITLES = {
    "training": "labels to train with",
    "labelled": "held-out labels",
    "accuracy": "accuracy",
    "f1": "F1",
    "iou": "IoU",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5c6675; --paper: #ffffff; --line: #d9dee6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b5; --paper: #14181f; --line: #323a47; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .6rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; } p { margin: .4rem 0; }
.note { border-left: 4px solid #c9a227; padding-left: .8rem; }
.scroll { overflow-x: auto; } img { max-width: 100%; background: #ffffff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
.facts td { text-align: left; overflow-wrap: anywhere; } .facts td:first-child { white-space: nowrap; }
"""


def write_page(out: Path, title: str, facts: Mapping[str, object], report: Mapping[str, Any]) -> None:
    """Write `report.html` into a run's folder, with the pictures that are there.

    Args:
        out: the folder; `confusion.png` and `maps/*.png` in it, or in the folder of its first seed, are shown.
        title: the heading.
        facts: what was done, by name.
        report: as in `metrics.json`. A score is a number, or a mapping with `mean`, `deviation` and `values`.
    """
    body = [f"<h1>{_text(title)}</h1>", _rows([[name, value] for name, value in facts.items()], "facts")]
    body += [f'<p class="note">{_text(note)}</p>' for note in notes(report)]
    scores = {name: report[name] for name in TITLES if name in report}
    seeds = report.get("seeds", [])
    head = ["score", "value", *(["deviation", *(f"seed {seed}" for seed in seeds)] if seeds else [])]
    body += [
        "<h2>Scores of the held-out labels</h2>",
        _rows([[TITLES[k], *_cells(v)] for k, v in scores.items()], head),
    ]
    if seeds:
        body.append("<p>Deviations are sample standard deviations over the seeds, with n - 1 in the denominator.</p>")
    columns = [column for column in CLASS_TITLES if column in next(iter(report["classes"].values()))]
    rows = [[name, *(_short(row[column]) for column in columns)] for name, row in report["classes"].items()]
    body += ["<h2>Classes</h2>", _rows(rows, ["class", *(CLASS_TITLES[column] for column in columns)])]
    if seeds:
        body.append("<p>Numbers of labels are sums over the seeds.</p>")
    body += ["<h2>Confusion</h2>", _picture(out / "confusion.png", "confusion matrix")]
    first = out / f"seed-{seeds[0]}" if seeds else out
    maps = sorted((first / "maps").glob("*.png"))
    if maps:
        body.append(f"<h2>Maps{f' of seed {seeds[0]}' if seeds else ''}</h2>")
        body += [_picture(path, f"map of {path.stem}") for path in maps]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    write_atomically(out / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def notes(report: Mapping[str, Any]) -> list[str]:
    """Return what a reader has to know about the scores of a report before they compare them with others."""
    found = []
    if report.get("keep") == "best":
        found.append(
            "The kept epoch is the one that scored best on these labels, so the scores are too optimistic; "
            "--keep last selects nothing."
        )
    if report.get("neighbours"):
        found.append(
            "Training and test pixels are neighbours and lie in each other's windows, so the scores say little about "
            "other places; --split blocks:PIXELS keeps them apart."
        )
    if missing := report.get("not_trained"):
        found.append(f"No label to train with has the class {', '.join(missing)}.")
    return found


def _rows(rows: Sequence[Sequence[object]], head: Sequence[str] | str) -> str:
    """Return a table; `head` are the titles of its columns, or the class of one without titles."""
    titles = "" if isinstance(head, str) else f"<tr>{''.join(f'<th>{_text(title)}</th>' for title in head)}</tr>"
    lines = (f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = f' class="{head}"' if isinstance(head, str) else ""
    return f'<div class="scroll"><table{kind}>{titles}{"".join(lines)}</table></div>'


def _cells(score: Any) -> list[str]:
    """Return the cells of a score in the table of scores."""
    if not isinstance(score, Mapping):
        return [f"{score:.4f}"]
    return [f"{score['mean']:.4f}", f"{score['deviation']:.4f}", *(f"{value:.4f}" for value in score["values"])]


def _short(score: Any) -> str:
    """Return a score of a class, with its deviation if there is one."""
    if isinstance(score, Mapping):
        return f"{score['mean']:.4f} ± {score['deviation']:.4f}"
    return f"{score:,}" if isinstance(score, int) else f"{score:.4f}"


def _picture(path: Path, alternative: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="{_text(alternative)}" src="data:image/png;base64,{data}"></p>'


def _text(text: object) -> str:
    return html.escape(printable(text))

"""The page's plots as inline SVG, drawn without pyplot's state."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bench.results import exponent
from mmmae.cost.page import COLOURS

BLUE, RED, GREY, SOFT, INK, LINE = "#3f7fdc", "#b3341f", "#8b93a1", "#5c6675", "#1c2330", "#e3e7ed"
# Ours is blue wherever it is drawn; others are grey, and where lines must be told apart of these colours.
OTHERS = (SOFT, "#e0912f", "#35a06b", "#9a6fd0", "#1f9fb5", "#c9a227")
THEMED = {INK: "--ink", SOFT: "--soft", LINE: "--line", "#ffffff": "--paper", RED: "--bad"}  # CSS variables
NARROW, WIDE = 4.4, 10.4  # inches: a column of the page, and the whole page
ROW, FRAME = 0.27, 0.55  # inches: a bar, and what surrounds bars
LOGARITHMIC = " (logarithmic)"
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmmae",
    "text.parse_math": False,
    "text.color": INK,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": SOFT,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "xtick.labelcolor": SOFT,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def svg(title: str, draw: Callable[[Axes], None], height: float, width: float = NARROW) -> str:
    """Return a drawing of one panel under its title, to stand in a `<figure>` of an HTML page."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return f"<figcaption>{html.escape(title)}</figcaption>{_inline(file.getvalue(), title)}"


def _inline(file: str, title: str) -> str:
    """Return the drawing in the page's colours, without what only a file needs."""
    _, tag, drawing = re.split(r"(<svg [^>]*>)", file, maxsplit=1)
    box = re.search(r'viewBox="[^"]*"', tag)
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace("'DejaVu Sans'", "system-ui, sans-serif")
    for colour, variable in THEMED.items():
        drawing = drawing.replace(f": {colour}", f": var({variable})")
    return f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(title)}">{drawing}'


def number_ids(page: str) -> str:
    """Return the page with ids of drawings that no other drawing of it has: matplotlib gives all the same."""
    numbers = itertools.count()

    def renamed(drawing: re.Match[str]) -> str:
        number = next(numbers)
        return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>p{number}-", drawing[0])

    return re.sub(r"<svg.*?</svg>", renamed, page, flags=re.DOTALL)


class Bar(NamedTuple):
    """A bar of a plot.

    Args:
        name: stands at its left.
        value: its length.
        text: stands at its right.
        ours: whether it is blue.
        spread: least and greatest value, drawn as a whisker, or None.
        bad: whether the text is red.
    """

    name: str
    value: float
    text: str
    ours: bool
    spread: tuple[float, float] | None = None
    bad: bool = False


def bars(title: str, label: str, rows: Sequence[Bar], line: float | None = None, width: float = NARROW) -> str:
    """Draw bars from 0, the first on top, and a line across them at a value."""

    def draw(axes: Axes) -> None:
        for row, bar in enumerate(rows):
            axes.barh(row, bar.value, height=0.66, color=BLUE if bar.ours else GREY)
            if bar.spread:
                axes.plot(bar.spread, [row, row], color=INK, linewidth=1, marker="|", markersize=5)
            place = axes.get_yaxis_transform()
            colour, weight = RED if bar.bad else INK, "bold" if bar.ours else "normal"
            axes.text(1.02, row, bar.text, transform=place, va="center", color=colour, fontweight=weight)
        if line is not None:
            axes.axvline(line, color=INK, linewidth=1)
        ends = [line or 0.0, *(bar.spread[1] if bar.spread else bar.value for bar in rows)]
        axes.set_xlim(0, 1.02 * max(ends))
        axes.xaxis.set_major_locator(MaxNLocator(4 if width == NARROW else 10))
        axes.set_yticks(range(len(rows)), [bar.name for bar in rows])
        for text, bar in zip(axes.get_yticklabels(), rows, strict=True):
            text.set_fontweight("bold" if bar.ours else "normal")
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.grid(True, axis="x")
        axes.set_xlabel(label)

    return svg(title, draw, FRAME + ROW * len(rows), width)


class Point(NamedTuple):
    """An op on the roofline: operations a byte, GFLOP/s; ours are filled, and named where `name` is given."""

    intensity: float
    speed: float
    ours: bool
    name: str = ""


def roofline(title: str, points: Sequence[Point], gb_s: float, gflop_s: float) -> str:
    """Draw speed against operations a byte, under the roof of copies and that of matrix products."""
    low = min(*(point.intensity for point in points), gflop_s / gb_s) / 2
    high = max(*(point.intensity for point in points), gflop_s / gb_s) * 2
    named = sorted((point for point in points if point.name), key=lambda point: point.speed)

    def draw(axes: Axes) -> None:
        knee = gflop_s / gb_s
        axes.plot([low, knee, high], [low * gb_s, gflop_s, gflop_s], color=INK, linewidth=1.5)
        axes.text(knee, 1.06 * gflop_s, f"matrix products: {gflop_s:,.0f} GFLOP/s", ha="left", va="bottom")
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylabel="GFLOP/s" + LOGARITHMIC)
        axes.set_ylim(min(*(point.speed for point in points), low * gb_s) / 1.5, 1.8 * gflop_s)
        axes.text(0.02, 0.97, f"slope: copies, {gb_s:,.1f} GB/s", transform=axes.transAxes, va="top", color=SOFT)
        for ours, name in ((True, "ours"), (False, "others")):
            kind = [point for point in points if point.ours == ours]
            fill = BLUE if ours else "none"
            x, y = [point.intensity for point in kind], [point.speed for point in kind]
            axes.scatter(x, y, 32, facecolors=fill, edgecolors=BLUE if ours else GREY, label=name, zorder=3)
        for place, point in zip(_apart([_height(axes, point) for point in named], 0.065), named, strict=True):
            arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 4, "relpos": (0, 0.5)}
            at = (point.intensity, point.speed)
            axes.annotate(point.name, at, (1.02, place), textcoords="axes fraction", va="center", arrowprops=arrow)
        _log_axis(axes.xaxis)
        _log_axis(axes.yaxis)
        axes.grid(True)
        axes.set_xlabel("arithmetic intensity, FLOP per byte that has to move" + LOGARITHMIC)
        axes.legend(loc="lower right")

    return svg(title, draw, 4.0, WIDE)


class Line(NamedTuple):
    """A line of `curves` through points."""

    name: str
    ours: bool
    points: Sequence[tuple[float, float]]


def curves(title: str, labels: tuple[str, str], lines: Sequence[Line], log: bool, fit: bool) -> str:
    """Draw lines through points; on log scales with `fit` the legend says the power of x that each grows with."""
    others = dict(zip((line.name for line in lines if not line.ours), OTHERS, strict=False))

    def draw(axes: Axes) -> None:
        for line in lines:
            power = exponent(line.points) if log and fit and len(line.points) > 2 else math.nan
            shown = line.name if math.isnan(power) else f"{line.name}: exponent {power:.2f}"
            x, y = zip(*line.points, strict=True)
            axes.plot(x, y, "o-", color=others.get(line.name, BLUE), label=shown)
        found = [point for line in lines for point in line.points]
        if log:
            axes.set(xscale="log", yscale="log")
            low, high = min(y for _, y in found), max(y for _, y in found)
            axes.set_ylim(low / 1.6, high * 1.6)
            _log_axis(axes.yaxis)
        else:
            axes.set_ylim(0, 1.15 * max(y for _, y in found))
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for x, _ in found})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.grid(True)
        xlabel, ylabel = (label + LOGARITHMIC if log else label for label in labels)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)

    return svg(title, draw, 3.0)


def sunburst(title: str, amounts: Mapping[str, float], unit: str) -> str:
    """Draw rings of shares: groups, named by what is before a name's point, inside; their members outside."""
    members: dict[str, list[str]] = {}
    for name in amounts:
        members.setdefault(name.split(".")[0], []).append(name)
    total = sum(amounts.values())
    inner = {group: sum(amounts[name] for name in names) for group, names in members.items()}
    outer = {
        name: to_rgba(COLOURS.get(group, GREY), max(0.9 - 0.22 * number, 0.3))
        for group, names in members.items()
        for number, name in enumerate(names)
    }

    def draw(axes: Axes) -> None:
        first: dict[str, Any] = {"startangle": 90, "counterclock": False}
        first["wedgeprops"] = {"width": 0.33, "edgecolor": "white", "linewidth": 1}
        axes.pie(list(inner.values()), radius=0.82, colors=[COLOURS.get(group, GREY) for group in inner], **first)
        wedges = axes.pie([amounts[name] for name in outer], radius=1.18, colors=list(outer.values()), **first)[0]
        axes.text(0, 0, f"{total:,.2f}\n{unit}", ha="center", va="center", fontweight="bold")
        texts = [f"{name}: {amounts[name]:,.2f}, {amounts[name] / total:.0%}" for name in outer]
        axes.legend(
            wedges, texts, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, handlelength=1, handletextpad=0.4
        )

    return svg(title, draw, 2.4, 5.2)


def _log_axis(axis: Axis) -> None:
    """Set ticks in the steps 1, 2, 5, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def _plain(number: float, position: int | None = None) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:g}"


def _height(axes: Axes, point: Point) -> float:
    """Return the height of a point in the panel, 0 to 1."""
    low, high = map(math.log, axes.get_ylim())
    return (math.log(point.speed) - low) / (high - low)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Move rising numbers up until they are a gap apart, then all down so that their mean stays."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    down = sum(new - old for new, old in zip(moved, places, strict=True)) / max(len(moved), 1)
    return [place - down for place in moved]

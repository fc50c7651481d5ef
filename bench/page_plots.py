"""The page's plots as inline SVG, drawn without pyplot's state and with ids that no other plot of a page has."""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.results import exponent
from mmmae.cost.page import COLOURS

BLUE, RED, GREY, SOFT, INK = "#3f7fdc", "#d64f63", "#8b93a1", "#5c6675", "#1c2330"
PALETTE = (BLUE, "#e0912f", "#35a06b", "#9a6fd0", "#1f9fb5", "#c9a227")
NARROW, WIDE = 5.2, 10.4  # inches: a column of the page, and both
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500)
ROW, FRAME = 0.27, 0.75  # inches: a bar, and what surrounds bars
NOTABLE = 0.995  # what is not 1.00 in two digits is slower
LETTERS = 12  # of a title, an inch
LOOK = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmmae",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": "#e3e7ed",
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def svg(title: str, draw: Callable[[Axes], None], height: float, width: float = NARROW) -> str:
    """A figure of one panel, to stand in an HTML page as it is."""
    with matplotlib.rc_context(LOOK):
        lines = textwrap.fill(title, int(LETTERS * width))
        figure = Figure(figsize=(width, height + 0.16 * lines.count("\n")), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        figure.suptitle(lines, x=0.01, ha="left", fontsize=10, fontweight="bold")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _inline(file.getvalue(), title)


def _inline(file: str, title: str) -> str:
    """The drawing without what only a file needs; ids begin with a digest of the whole."""
    own = "p" + hashlib.sha256(file.encode()).hexdigest()[:8]
    _, tag, drawing = re.split(r"(<svg [^>]*>)", file, maxsplit=1)
    box = re.search(r'viewBox="[^"]*"', tag)
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{own}-", drawing)
    drawing = drawing.replace("'DejaVu Sans'", "system-ui, sans-serif")
    return f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(title)}">{drawing}'


class Bar(NamedTuple):
    """How many times as fast ours is, or another where `ours` is false, with the least and the greatest of rounds."""

    name: str
    value: float
    low: float
    high: float
    ours: bool = True


def ratio_bars(title: str, label: str, bars: Sequence[Bar], span: tuple[float, float]) -> str:
    """Bars from 1 on a log scale that plots can share by `span`; in red where ours is slower."""

    def draw(axes: Axes) -> None:
        for row, bar in enumerate(bars):
            slower = bar.ours and bar.value < NOTABLE
            axes.barh(row, bar.value - 1, left=1, height=0.62, color=RED if slower else paint(bar.ours))
            axes.plot([bar.low, bar.high], [row, row], color=INK, linewidth=1.2, marker="|", markersize=6)
            right = max(bar.high, bar.value, 1)
            text = f"{bar.value:.2f}" + (", slower" if slower else "")
            colour = RED if slower else INK
            axes.annotate(text, (right, row), (5, 0), textcoords="offset points", va="center", color=colour)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(span[0] / 1.15, span[1] * (span[1] / span[0]) ** 0.45)
        _ticks(axes, TICKS, axes.get_xlim())
        _rows(axes, [bar.name for bar in bars])
        axes.set_xlabel(label)

    return svg(title, draw, FRAME + ROW * len(bars))


def share_bars(title: str, label: str, bars: Sequence[tuple[str, float, bool]]) -> str:
    """Names, shares next to a line at 1, and whether they are ours."""
    names, shares, ours = zip(*bars, strict=True)

    def draw(axes: Axes) -> None:
        drawn = axes.barh(range(len(bars)), shares, height=0.62, color=[paint(one) for one in ours])
        axes.axvline(1, color=INK, linewidth=1)
        over_the_line = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.bar_label(drawn, [f"{share:.2f}" for share in shares], padding=4, bbox=over_the_line)
        axes.set_xlim(0, 1.1 * max(1.0, *shares))
        _rows(axes, names)
        axes.set_xlabel(label)

    return svg(title, draw, FRAME + ROW * len(bars), WIDE)


def paint(ours: bool) -> str:
    """The colour of a bar."""
    return BLUE if ours else GREY


def grouped_bars(title: str, label: str, names: Sequence[str], kinds: Mapping[str, Sequence[float]]) -> str:
    """Of each name a bar a kind; NaN is left out, and a kind that has nothing else."""
    known = {kind: values for kind, values in kinds.items() if not all(map(math.isnan, values))}
    colours = dict(zip(kinds, PALETTE, strict=False))
    height = 0.8 / len(known)

    def draw(axes: Axes) -> None:
        for number, (kind, values) in enumerate(known.items()):
            places = [row + (number - (len(known) - 1) / 2) * height for row in range(len(names))]
            drawn = axes.barh(places, values, height=0.9 * height, color=colours[kind], label=kind)
            axes.bar_label(drawn, ["" if math.isnan(value) else f"{value:.2f}" for value in values], padding=3)
        axes.margins(x=0.15)
        _rows(axes, names)
        axes.set_xlabel(label)
        axes.figure.legend(loc="outside lower left", ncols=len(known))  # type: ignore[union-attr]

    return svg(title, draw, FRAME + 0.35 + 0.7 * ROW * len(names) * len(known))


class Point(NamedTuple):
    """An op on the roofline: operations a byte, GFLOP/s; ours are filled, and named where `name` is given."""

    intensity: float
    speed: float
    ours: bool
    name: str = ""


def roofline(title: str, points: Sequence[Point], gb_s: float, gflop_s: float) -> str:
    """Speed against operations a byte, under the roof of copies and that of matrix products."""
    low = min(*(point.intensity for point in points), gflop_s / gb_s) / 2
    high = max(*(point.intensity for point in points), gflop_s / gb_s) * 2
    named = sorted((point for point in points if point.name), key=lambda point: point.speed)

    def draw(axes: Axes) -> None:
        knee = gflop_s / gb_s
        axes.plot([low, knee, high], [low * gb_s, gflop_s, gflop_s], color=INK, linewidth=1.5)
        axes.text(knee, 1.06 * gflop_s, f"matrix products: {gflop_s:,.0f} GFLOP/s", ha="left", va="bottom")
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylabel="GFLOP/s")
        axes.set_ylim(min(*(point.speed for point in points), low * gb_s) / 1.5, 1.8 * gflop_s)
        axes.text(0.02, 0.97, f"slope: copies, {gb_s:,.1f} GB/s", transform=axes.transAxes, va="top", color=SOFT)
        for ours, name in ((True, "ours"), (False, "others")):
            kind = [point for point in points if point.ours == ours]
            fill = BLUE if ours else "none"
            x, y = [point.intensity for point in kind], [point.speed for point in kind]
            axes.scatter(x, y, 32, facecolors=fill, edgecolors=BLUE if ours else SOFT, label=name, zorder=3)
        for place, point in zip(_apart([_height(axes, point) for point in named], 0.055), named, strict=True):
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 4, "relpos": (0, 0.5)}
            at = (point.intensity, point.speed)
            axes.annotate(point.name, at, (1.02, place), textcoords="axes fraction", va="center", arrowprops=line)
        _log_axis(axes.xaxis)
        _log_axis(axes.yaxis)
        axes.grid(True)
        axes.set_xlabel("arithmetic intensity, FLOP per byte that has to move")
        axes.legend(loc="lower right")

    return svg(title, draw, 4.8, WIDE)


def curves(
    title: str, labels: tuple[str, str], series: Mapping[str, Sequence[tuple[float, float]]], log: bool, fit: bool
) -> str:
    """Lines through points; on log scales with `fit` the legend says the power of x that each grows with."""

    def draw(axes: Axes) -> None:
        for number, (name, points) in enumerate(series.items()):
            power = exponent(points) if log and fit and len(points) > 2 else math.nan
            shown = name if math.isnan(power) else f"{name}: exponent {power:.2f}"
            axes.plot(*zip(*points, strict=True), "o-", color=PALETTE[number % len(PALETTE)], label=shown)
        found = [point for points in series.values() for point in points]
        numbers = sorted({x for x, _ in found})
        if log:
            axes.set(xscale="log", yscale="log")
            low, high = min(y for _, y in found), max(y for _, y in found)
            axes.set_ylim(low / 1.6, high * 1.6)
            _log_axis(axes.yaxis)
        else:
            axes.set_ylim(0, 1.15 * max(y for _, y in found))
        _ticks(axes, numbers, (-math.inf, math.inf))
        axes.grid(True)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.figure.legend(loc="outside lower left", ncols=2)  # type: ignore[union-attr]

    return svg(title, draw, 3.2)


def sunburst(title: str, amounts: Mapping[str, float], unit: str) -> str:
    """Rings of shares: inside the groups, which are what is before a name's point, outside their members."""
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
        edge = {"width": 0.33, "edgecolor": "white", "linewidth": 1}
        first = {"startangle": 90, "counterclock": False, "wedgeprops": edge}
        axes.pie(list(inner.values()), radius=0.82, colors=[COLOURS.get(group, GREY) for group in inner], **first)
        wedges = axes.pie([amounts[name] for name in outer], radius=1.18, colors=list(outer.values()), **first)[0]
        axes.text(0, 0, f"{total:,.2f}\n{unit}", ha="center", va="center", fontweight="bold")
        texts = [f"{name}: {amounts[name]:,.2f}, {amounts[name] / total:.1%}" for name in outer]
        axes.legend(wedges, texts, loc="center left", bbox_to_anchor=(1.02, 0.5))

    return svg(title, draw, 3.2)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of the bars, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")


def _ticks(axes: Axes, numbers: Sequence[float], span: tuple[float, float]) -> None:
    """Of the axis of x, at these numbers within a span and nowhere else."""
    axes.xaxis.set_major_locator(FixedLocator([number for number in numbers if span[0] <= number <= span[1]]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))


def _log_axis(axis: Axis) -> None:
    """Ticks in the steps 1, 2, 5, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def _plain(number: float, position: int | None = None) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:g}"


def _height(axes: Axes, point: Point) -> float:
    """Of a point in the panel, 0 to 1."""
    low, high = map(math.log, axes.get_ylim())
    return (math.log(point.speed) - low) / (high - low)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising numbers moved up until they are a gap apart, all as little too high as too low."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    down = sum(new - old for new, old in zip(moved, places, strict=True)) / max(len(moved), 1)
    return [place - down for place in moved]

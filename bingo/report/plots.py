"""Charts as SVG text for an HTML page: equal numbers give equal bytes, and the page's CSS sets the colours.

Colours are custom properties of the page (`--ink`, `--muted`, `--grid`, `--series-1` ...), so that a chart works in light and dark mode.
Matplotlib supports only fixed colours, so each property has a placeholder colour that is replaced in the SVG text.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#0a0101", "#0a0202", "#0a0303", "#0a0404", "#0a0505")
_PROPERTIES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {c: f"series-{i}" for i, c in enumerate(SERIES, 1)}
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
Bar = tuple[str, Sequence[float | None], int]  # label, percentages in the order of the measures (None: not measured), colour in SERIES
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
_BAR_ALPHAS = (1.0, 0.45)
_MARKERS = ("o", "v", "s", "D", "^")  # a shape for each colour of SERIES
_PLACES: dict[tuple[float, float], Any] = {
    (8, 0): {"ha": "left", "va": "center"},
    (-8, 0): {"ha": "right", "va": "center"},
    **{(side * 7, up * lift): {"ha": "left" if side > 0 else "right", "va": "center"}
       for lift in (9, 18, 27) for up in (1, -1) for side in (1, -1)},
}  # fmt: skip


def accuracy_bars(name: str, bars: Sequence[Bar], measures: Sequence[str], chance_percent: float) -> Markup:
    """Horizontal bars of one or two measures for each network, in percent, with a dashed line at chance."""
    with _style(name):
        figure = Figure(figsize=(3.5, 0.6 + 0.42 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        height = 0.74 / len(measures)
        for row, (_, percents, color) in enumerate(bars):
            for measure, percent in enumerate(percents):
                if percent is not None:
                    y = row + (measure - (len(measures) - 1) / 2) * height
                    axes.barh(y, percent, height * 0.9, color=SERIES[color], alpha=_BAR_ALPHAS[measure])
                    axes.text(percent + 1, y, f"{percent:.1f}", va="center", fontsize=7.5)
        axes.axvline(chance_percent, color=MUTED, linestyle=(0, (3, 3)), linewidth=1, zorder=0)
        axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], color=INK)
        axes.set(xlim=(0, 118), xticks=range(0, 101, 25), ylim=(len(bars) - 0.45, -0.55), xlabel="percent")
        axes.tick_params(length=0)
        axes.spines.left.set_visible(False)
        figures = (f"{label} {_listed(percents)}" for label, percents, _ in bars)
        return _svg(figure, name, f"Bars of {' and '.join(measures)}, percent: {'; '.join(figures)}.")


def lines(name: str, title: str, series: Series, colors: Sequence[int], summary: str) -> Markup:
    """Lines over epochs: {label: (epochs, values)}; a value that is nan is left out. `colors` number SERIES, in turn.

    `summary` is the text for screen readers.
    """
    with _style(name):
        figure = Figure(figsize=(3.7, 2.3), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, (epochs, values)) in enumerate(series.items()):
            known = [(x, y) for x, y in zip(epochs, values, strict=True) if math.isfinite(y)]
            looks: Any = {
                "color": SERIES[colors[number % len(colors)]],
                "marker": "o" if len(known) <= 15 else "",
                "markersize": 3,
            }
            axes.plot([x for x, _ in known], [y for _, y in known], linewidth=1.6, label=label, **looks)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        _soften(axes)
        if len(series) > 1:
            axes.legend(ncols=2 if len(series) > 3 else 1)
        return _svg(figure, name, summary)


@dataclass(frozen=True)
class Point:
    """One point of `labelled_points`: `spread` is half the length of its error bar (None: no bar); `kind` numbers SERIES and _MARKERS."""

    label: str
    x: float
    y: float
    spread: float | None
    kind: int


def labelled_points(name: str, points: Sequence[Point], x_label: str, y_label: str, line: tuple[str, float] | None, summary: str) -> Markup:
    """Points with error bars and labels; x is logarithmic if it spans a factor of 8 or more; a dashed line at a named height."""
    with _style(name):
        figure = Figure(figsize=(7.6, 3.9), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            color = SERIES[point.kind]
            axes.errorbar(
                point.x, point.y, point.spread, fmt=_MARKERS[point.kind], color=color, markersize=6, capsize=3, elinewidth=1.2, zorder=3
            )
        if line:
            axes.axhline(line[1], color=MUTED, linestyle=(0, (3, 3)), linewidth=1, zorder=0)
            axes.annotate(line[0], (0, line[1]), (4, 3), ("axes fraction", "data"), "offset points", color=MUTED)
        if min(point.x for point in points) * 8 < max(point.x for point in points):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.12, y=0.12)
        axes.set(xlabel=x_label, ylabel=y_label)
        _soften(axes)
        axes.grid(axis="x")
        _name_points(figure, axes, points)
        return _svg(figure, name, summary)


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Place each label where it covers as little as possible of points and other labels, preferring nearby positions."""
    figure.draw_without_rendering()  # fixes the layout, so that positions are known
    figure.set_layout_engine("none")
    taken = [*(_covered_by(point, axes) for point in points), *(text.get_window_extent() for text in axes.texts)]
    for point in points:
        best: tuple[float, Any, Any] | None = None
        for offset, where in _PLACES.items():
            text = axes.annotate(point.label, (point.x, point.y), offset, textcoords="offset points", zorder=4, **where)
            box = text.get_window_extent()
            covered = sum(_overlap(box, other) for other in taken) + 10 * (box.width * box.height - _overlap(box, axes.bbox))
            text.remove()
            if best is None or covered < best[0] - 1e-6:
                best = covered, (offset, where), box
        assert best is not None
        offset, where = best[1]
        axes.annotate(point.label, (point.x, point.y), offset, textcoords="offset points", zorder=4, **where)
        taken.append(best[2])


def _covered_by(point: Point, axes: Axes) -> Bbox:
    """What a marker and its error bar cover, in pixels."""
    x, low = axes.transData.transform((point.x, point.y - (point.spread or 0)))
    _, high = axes.transData.transform((point.x, point.y + (point.spread or 0)))
    return Bbox.from_extents(x - 6, low - 6, x + 6, high + 6)


def _overlap(one: Bbox, other: Bbox) -> float:
    """The common area of two boxes."""
    common = Bbox.intersection(one, other)
    return common.width * common.height if common else 0.0


def _style(name: str) -> AbstractContextManager[None]:
    """Matplotlib's settings for one chart; `name` is what it hashes ids with, in place of a random number."""
    return matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": name})


def _soften(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines.left.set_visible(False)


def _listed(percents: Sequence[float | None]) -> str:
    return " and ".join("not measured" if percent is None else f"{percent:.1f}" for percent in percents)


def _svg(figure: Figure, name: str, summary: str) -> Markup:
    """The figure as an <svg> element for a page with several charts; `name`, unique in the page, keeps their ids apart."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)  # would apply to the whole page
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = _with_own_ids(body.replace("xlink:href", "href"), name)
    body = re.sub(r'font-family: [^;"]*;? ?| transform="rotate\(-0 [^"]*"', "", body)  # use the page's font; remove rotations by 0 degrees
    for color, name_of_property in _PROPERTIES.items():
        body = body.replace(color, f"var(--{name_of_property})")
    width_pt, height_pt = (72 * inches for inches in figure.get_size_inches())
    head = f'<svg viewBox="0 0 {width_pt:g} {height_pt:g}" role="img" aria-label="{escape(summary)}">'
    return Markup(head + re.sub(r"\s*\n\s*", "\n", body).strip())


def _with_own_ids(body: str, name: str) -> str:
    """Remove ids without references (matplotlib numbers all parts, equally in every figure), and prefix the others."""
    wanted = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))

    def new_id(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in wanted else ""

    body = re.sub(r' id="([^"]*)"', new_id, body)
    return re.sub(r'(url\(#|href="#)([^)"]+)', rf"\g<1>{name}-\g<2>", body)

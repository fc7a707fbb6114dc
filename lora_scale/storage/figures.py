"""Pictures as SVG text, drawn with matplotlib. Draws points and bars; knows no run. matplotlib is imported when called,
because `plan` answers within a second and never draws."""

import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from math import ceil
from textwrap import wrap
from typing import Any

Points = Sequence[tuple[float, float]]

MAX_POINTS = 600  # a curve: more are not to be seen in its width
COLOURS = ("#3b6ea5", "#d1602b", "#4f9153", "#8a5fa8", "#c9a227", "#5aa7b0", "#b5485d", "#7d7d7d", "#a5754c", "#2f4858")
WIDTH = 7.4  # inches
LABEL = 44  # characters of a bar's name in a line
SMALL = "the rest, each below 1%"


def curves(title: str, x_label: str, series: Mapping[str, Points]) -> str:
    """Lines over one x axis, each with its name; every series has at least one point."""
    figure, axes = _figure(2.9)
    for (name, points), colour in zip(series.items(), COLOURS, strict=False):
        few = len(points) <= 40
        axes.plot(
            *zip(*_thinned(points), strict=True), color=colour, label=name, lw=1.5, marker="o" if few else "", ms=3
        )
    axes.set(xlabel=x_label)
    axes.grid(color="#e4e4e4", lw=0.6)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _svg(figure, axes, title)


def stacks(title: str, y_label: str, bars: Mapping[str, Mapping[str, float]], marks: Mapping[str, float]) -> str:
    """One bar for each name, made of its categories from the bottom; the same category has one colour in all of them.
    `marks` puts a dash with a figure above bars: what was measured where the bar is predicted."""
    longest = max(sum(parts.values()) for parts in bars.values())
    bars = {bar: _without_small(parts, longest) for bar, parts in bars.items()}
    names = list(dict.fromkeys(category for parts in bars.values() for category, value in parts.items() if value))
    figure, axes = _figure(0.34 * len(bars) + 0.24 * ceil(len(names) / 3) + 0.8)
    left = dict.fromkeys(bars, 0.0)
    for number, category in enumerate(names):
        values = [bars[bar].get(category, 0.0) for bar in bars]
        offsets = [left[bar] for bar in bars]
        axes.barh(list(bars), values, left=offsets, color=COLOURS[number % len(COLOURS)], label=category, height=0.62)
        left = {bar: offset + value for bar, offset, value in zip(bars, offsets, values, strict=True)}
    most = max(*left.values(), *marks.values(), 1e-9) if marks else max(*left.values(), 1e-9, 0)
    for position, bar in enumerate(bars):
        axes.text(left[bar] + most * 0.008, position, f"{left[bar]:.3g}", va="center", fontsize=8)
        if bar in marks:
            axes.plot([marks[bar]] * 2, [position - 0.4, position + 0.4], color="black", lw=2)
            axes.text(marks[bar], position - 0.42, f"measured {marks[bar]:.3g}", fontsize=7, ha="center", va="bottom")
    axes.set(xlabel=y_label, xlim=(0, most * 1.12))
    axes.invert_yaxis()
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower left")
    return _svg(figure, axes, title)


def waterfall(title: str, x_label: str, steps: Sequence[tuple[str, float]]) -> str:
    """The first and the last value as whole bars, and between them what each step adds or takes away; two at least."""
    names = ["\n".join(wrap(name, LABEL)) for name in (*(name for name, _ in steps), "all together")]
    lines = sum(max(1.0, 0.5 * len(name.splitlines())) for name in names)
    figure, axes = _figure(0.34 * lines + 0.8)
    before, most = 0.0, max(value for _, value in steps)
    for position, (_, value) in enumerate(steps):
        colour = COLOURS[0] if not position else COLOURS[2] if value >= before else COLOURS[6]
        axes.barh(position, value - before, left=before, color=colour, height=0.62)
        change = f" ({value - before:+,.0f})" if position else ""
        axes.text(max(value, before) + most * 0.008, position, f"{value:,.0f}{change}", va="center", fontsize=8)
        before = value
    axes.barh(len(steps), before, color=COLOURS[0], height=0.62)
    axes.text(before + most * 0.008, len(steps), f"{before:,.0f}", va="center", fontsize=8)
    axes.set(xlabel=x_label, xlim=(0, most * 1.25), yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    return _svg(figure, axes, title)


def _without_small(parts: Mapping[str, float], longest: float) -> dict[str, float]:
    """Categories below 1% of the longest bar as one: they are not to be seen, and colours run out."""
    shown = {category: value for category, value in parts.items() if value >= 0.01 * longest}
    return shown | {SMALL: sum(parts.values()) - sum(shown.values())}


def _figure(height: float) -> tuple[Any, Any]:
    figure = import_module("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any, axes: Any, title: str) -> str:
    """The picture alone, without matplotlib's header, date and random names: the same points give the same text."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    text = io.StringIO()
    settings = {"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif"}
    with import_module("matplotlib").rc_context(settings):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, "Title": title})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _thinned(points: Points) -> Points:
    """At most MAX_POINTS of the points: the mean of each run of neighbours."""
    run = ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]

"""A line chart as SVG text, without a drawing library: quick, and it opens everywhere. Draws points; knows no run."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, floor, log10
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 30, 42  # margins, for labels
COLOURS = ("#1f5fa8", "#d1602b", "#3b8a4f", "#7a4fa3")
MAX_POINTS = 600  # a curve: more are not to be seen in its width


def line_chart(title: str, x_label: str, series: Mapping[str, Points]) -> str:
    """One picture of all series, each in its colour, with a legend. Every series has at least one point."""
    xs, ys = ([point[axis] for points in series.values() for point in points] for axis in (0, 1))
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
    ]
    for y in y_ticks:
        _, at = place(x_low, y)
        parts.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        at, _ = place(x, y_ticks[0])
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    for number, (name, points) in enumerate(series.items()):
        placed = [place(x, y) for x, y in _thinned(points)]
        parts.extend(_curve(name, placed, COLOURS[number % len(COLOURS)], number))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _curve(name: str, placed: Points, colour: str, number: int) -> Iterator[str]:
    """A line, dots where there are few points, and the name in the legend."""
    if len(placed) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    if len(placed) <= 40:
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in placed)
    at = WIDTH - RIGHT - 110 * (number + 1)
    yield f'<line x1="{at}" y1="14" x2="{at + 18}" y2="14" stroke="{colour}" stroke-width="3"/>'
    yield f'<text x="{at + 24}" y="18">{escape(name)}</text>'


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers, evenly spaced, the first at most `low` and the last at least `high`."""
    span = (high - low) or abs(high) or 1.0
    exponent = 10.0 ** floor(log10(span / 5))
    step = next(m * exponent for m in (1, 2, 5, 10) if span / (m * exponent) <= 5)
    first, last = floor(low / step), ceil(high / step)
    if first == last:
        last += 1
    return [round(n * step, 12) for n in range(first, last + 1)]


def _thinned(points: Points) -> Points:
    """At most MAX_POINTS of the points: the mean of each run of neighbours."""
    run = ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]

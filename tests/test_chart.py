"""The chart holds its points: what is read back from the SVG is what was drawn."""

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_scale.storage import chart

SVG = "{http://www.w3.org/2000/svg}"
finite = st.floats(-1e6, 1e6).map(lambda x: round(x, 6))


@given(low=finite, span=st.one_of(st.just(0.0), st.floats(1e-5, 1e6)))
@settings(max_examples=300, deadline=None)
def test_ticks_are_few_round_and_cover_the_range(low: float, span: float) -> None:
    found = chart.ticks(low, low + span)
    assert 2 <= len(found) <= 8
    step = found[1] - found[0]
    slack = 1e-9 * max(abs(low), abs(low + span), 1.0)
    assert found[0] <= low + slack and found[-1] >= low + span - slack
    assert float(f"{step:.3g}") == pytest.approx(step, rel=1e-4), "a round number"


def test_points_lie_where_their_values_say() -> None:
    picture = ET.fromstring(chart.line_chart("Loss < 4 & falling", "step", {"a": [(0, 4.0), (50, 2.0), (100, 3.0)]}))
    assert picture.attrib["aria-label"] == "Loss < 4 & falling"
    points = [tuple(map(float, p.split(","))) for p in picture.find(f"{SVG}polyline").attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y0 < y2 < y1, "up is more"
    assert y1 - y2 == pytest.approx(y2 - y0, abs=0.2)
    assert all(0 <= x <= chart.WIDTH and 0 <= y <= chart.HEIGHT for x, y in points)


def test_every_series_is_named_and_a_single_point_is_seen() -> None:
    picture = ET.fromstring(chart.line_chart("t", "step", {"training": [(1, 1.0), (2, 2.0)], "validation": [(1, 1.5)]}))
    assert {"training", "validation"} <= {text.text for text in picture.iter(f"{SVG}text")}
    assert len(list(picture.iter(f"{SVG}polyline"))) == 1 and len(list(picture.iter(f"{SVG}circle"))) == 3


def test_long_runs_are_thinned_without_losing_their_ends() -> None:
    points = [(step, 1.0) for step in range(100_000)]
    picture = ET.fromstring(chart.line_chart("t", "step", {"a": points}))
    drawn = picture.find(f"{SVG}polyline").attrib["points"].split()
    assert len(drawn) <= chart.MAX_POINTS
    assert float(drawn[0].split(",")[0]) == pytest.approx(chart.LEFT, abs=1.0)
    assert float(drawn[-1].split(",")[0]) == pytest.approx(chart.WIDTH - chart.RIGHT, abs=1.0)

import html
import json
import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclip.report.figures import Axis, Series, line_chart, nice_axis, smooth, thin, tick_label


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0)),
    (0.3, 5.2, (0.0, 2.0, 4.0, 6.0)),
    (0.996, 1.0, (0.996, 0.997, 0.998, 0.999, 1.0)),
    (-3.0, 7.0, (-5.0, -2.5, 0.0, 2.5, 5.0, 7.5)),
    (0.0, 5e-4, (0.0, 2e-4, 4e-4, 6e-4)),
    (2.0, 2.0, (1.0, 1.5, 2.0, 2.5, 3.0)),
    (0.0, 0.0, (-0.5, -0.25, 0.0, 0.25, 0.5)),
])
def test_ticks_are_round_numbers(low, high, ticks):
    axis = nice_axis(low, high)
    assert axis.ticks == ticks
    assert (axis.low, axis.high) == pytest.approx((ticks[0], ticks[-1]))


def test_an_axis_that_is_not_widened_keeps_its_ends():
    assert nice_axis(256.0, 137_984.0, widen=False) == Axis(256.0, 137_984.0, (50_000.0, 100_000.0))


finite = st.floats(-1e9, 1e9, allow_subnormal=False)


@given(finite, finite, st.booleans())
def test_ticks_are_few_ascending_evenly_spaced_and_inside(a, b, widen):
    low, high = min(a, b), max(a, b)
    axis = nice_axis(low, high, widen=widen)
    room = 1e-9 * (axis.high - axis.low)
    assert axis.low <= low + room
    assert high <= axis.high + room
    assert 1 <= len(axis.ticks) <= 7
    assert all(axis.low - room <= tick <= axis.high + room for tick in axis.ticks)
    steps = [after - before for before, after in pairwise(axis.ticks)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)


def test_labels_have_the_decimals_of_their_step():
    assert [tick_label(t, 0.025, "%") for t in (0.0, 0.025, 0.05)] == ["0", "2.5 %", "5.0 %"]
    assert [tick_label(t, 0.25, "") for t in (0.25, 1.0)] == ["0.25", "1.00"]
    assert tick_label(4e-4, 2e-4, "") == "4×10⁻⁴"  # noqa: RUF001
    assert tick_label(150_000.0, 50_000.0, "count") == "150k"
    assert [tick_label(t, 2e-4, "") for t in (0.9992, 0.9994, 7.559)] == ["0.9992", "0.9994", "7.5590"]


def test_thin_keeps_the_mean_and_the_last_point():
    points = [(float(i), float(i % 7)) for i in range(10_001)]
    few = thin(points, 100)
    assert len(few) <= 100
    assert few[-1] == points[-1]
    size = math.ceil(10_000 / 99)
    assert few[0] == (sum(range(size)) / size, sum(i % 7 for i in range(size)) / size)
    assert thin(points[:50], 100) == points[:50]


def test_smooth_is_the_two_sided_exponential_mean():
    points = [(float(i), float((i * 37) % 11)) for i in range(60)]
    decay = math.exp(-1.0 / max(1.0, 0.05 * 60))
    for (x, y), (i, _) in zip(smooth(points, 0.05), points, strict=True):
        weights = [decay ** abs(i - j) for j, _ in points]
        assert x == i
        total = sum(w * v for w, (_, v) in zip(weights, points, strict=True))
        assert y == pytest.approx(total / sum(weights))


def test_lines_go_through_their_points():
    chart = line_chart("t", [Series("up", [(0.0, 0.0), (5.0, 0.5), (10.0, 1.0)])])
    path = re.search(r'd="(M[^"]*)" class="line c1"', chart).group(1)
    assert path == "M0.0 1000.0L0.0 1000.0L500.0 500.0L1000.0 0.0"
    assert "from 0 to 1" in chart


def test_values_that_are_not_finite_leave_a_gap():
    points = [(0.0, 0.0), (1.0, math.nan), (2.0, 1.0), (3.0, math.inf), (4.0, 1.0)]
    chart = line_chart("t", [Series("gap", points)])
    path = re.search(r'd="(M[^"]*)" class="line c1"', chart).group(1)
    assert path.count("M") == 3
    assert "nan" not in chart
    assert "inf" not in chart


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("at", [0, -1, 2])
def test_a_missing_value_first_last_or_between_is_left_out(missing, at):
    points = [(float(x), 0.25 + x / 8) for x in range(5)]
    points[at] = (points[at][0], missing)
    chart = line_chart("t", [Series("loss", points)], unit="%")
    finite = [y for _, y in points if y is not None and math.isfinite(y)]
    assert f"loss from {100 * finite[0]:.1f} % to {100 * finite[-1]:.1f} %" in chart
    assert f"<b>{100 * finite[-1]:.1f} %</b>" in chart
    assert "nan" not in chart
    assert len(json.loads(html.unescape(re.search(r'data-chart="([^"]*)"', chart).group(1)))[0]["points"]) == 4


def test_thinning_keeps_a_line_that_is_full_of_gaps():
    few = thin([(float(x), math.nan if x % 2 else 1.0) for x in range(10_001)], 100)
    assert [y for _, y in few] == [1.0] * len(few)
    assert math.isnan(thin([(float(x), math.nan) for x in range(1000)], 10)[0][1])


def test_nothing_to_draw_gives_nothing():
    assert line_chart("t", []) == ""
    assert line_chart("t", [Series("empty", []), Series("nan", [(0.0, math.nan), (1.0, None)])]) == ""


@pytest.mark.parametrize("value", [0.996, -3.0, 1e-30])
def test_equal_and_nearly_equal_values_are_drawn(value):
    series = [Series("flat", [(0.0, value), (1.0, math.nextafter(value, math.inf))])]
    assert re.search(r'd="M[^"]*" class="line c1"', line_chart("t", series))


def test_cursor_reads_lines_and_not_the_raw_values_behind():
    series = [Series("raw", [(0.0, 1.0)], 1, "faint"), Series("chance", [(0.0, 2.0)], 0, "dashed"),
              Series('"quoted"', [(0.0, 0.5), (1e6, 0.25)])]
    chart = line_chart("t", series, unit="%")
    data = re.search(r'data-chart="([^"]*)"', chart).group(1).replace("&#34;", '"')
    assert json.loads(data) == [{"name": '"quoted"', "colour": 1,
                                 "points": [[0.0, "0", "50.0 %"], [1.0, "1,000,000", "25.0 %"]]}]


def test_one_point_is_drawn_as_a_dot():
    chart = line_chart("t", [Series("one", [(3.0, 2.0)])])
    assert re.search(r'd="M(\S+ \S+)L\1" class="line', chart)

"""Line charts as inline SVG.

The lines are drawn in an SVG that stretches with the page (strokes keep their width); ticks and legend are
HTML beside it, so that text keeps its size on any screen. `report.js` adds a cursor that reads out values.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from aclip.report.formats import compact, count, percent
from aclip.report.markup import Html, tag

SIZE = 1000.0  # units of the drawing, both ways
MAX_POINTS = 320  # more cannot be told apart on a screen, and the page stays small


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (x, y) with x ascending; a y that is not finite leaves a gap.
        colour: number in the palette of `style.css`, 0 is neutral grey.
        style: "line"; "faint" for raw values behind a smoothed line (not in the legend); "dashed" for a
            level to compare with.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    style: Literal["line", "faint", "dashed"] = "line"


Drawn = Sequence[tuple[Series, list[tuple[float, float]]]]
"""Lines with the points that are drawn of them."""


@dataclass(frozen=True)
class Axis:
    """A range with its ticks.

    Attributes:
        low, high: the range, low < high.
        ticks: ascending, inside the range.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Return where `value` lies, 0 at `low` and 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


def nice_axis(low: float, high: float, intervals: int = 4, widen: bool = True) -> Axis:
    """Return an axis around [low, high] whose ticks are multiples of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        low, high: finite; equal values get room on both sides.
        intervals: the number of intervals aimed at.
        widen: whether the axis grows to the next tick on either side, or ends at `low` and `high`.
    """
    if low == high:
        room = abs(low) / 2 or 0.5
        low, high = low - room, high + room
    raw = (high - low) / intervals
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1.0, 2.0, 2.5, 5.0, 10.0) if power * m >= raw * (1 - 1e-9))
    if widen:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    else:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounding removes the binary dust of multiples: 0.30000000000000004 would be a label.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return Axis(low, high, tuple(round(i * step, digits) for i in range(first, last + 1)))


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most `limit` points: means over runs of neighbours, the last point as it is."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil((len(points) - 1) / (limit - 1))
    body = points[:-1]
    groups = [body[i : i + size] for i in range(0, len(body), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [*means, points[-1]]


def smooth(points: Sequence[tuple[float, float]], width: float = 0.015) -> list[tuple[float, float]]:
    """Return the points averaged with weights exp(-distance / width), to both sides and so without lag.

    Args:
        points: (x, y); values that are not finite are left out.
        width: of the average, as a share of the number of points.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    decay = math.exp(-1.0 / max(1.0, width * len(finite)))

    def one_sided(values: Sequence[float]) -> list[tuple[float, float]]:
        total, weight, sums = 0.0, 0.0, []
        for value in values:
            total, weight = decay * total + value, decay * weight + 1.0
            sums.append((total, weight))
        return sums

    ys = [y for _, y in finite]
    both = zip(finite, one_sided(ys), reversed(one_sided(ys[::-1])), strict=True)
    return [(x, (before + after - y) / (w + v - 1.0)) for (x, y), (before, w), (after, v) in both]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: Literal["", "%"] = "",
    from_zero: bool = False,
    digits: int = 3,
    note: str = "",
    x_label: str = "samples seen",
    last_values: bool = True,
) -> Html:
    """Return a chart as a `<figure>`; series without a finite point are left out, and none gives nothing.

    Args:
        title: what is drawn.
        series: the lines.
        unit: "%" for shares in [0, 1], else plain numbers.
        from_zero: whether the vertical axis must include 0.
        digits: significant digits of values in legend and cursor.
        note: small print beside the title.
        x_label: what the horizontal axis counts.
        last_values: whether the legend says where each line ends.
    """
    drawn = [(s, thin(s.points)) for s in series]
    drawn = [(s, points) for s, points in drawn if any(math.isfinite(y) for _, y in points)]
    if not drawn:
        return Html("")
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points if math.isfinite(y)] + ([0.0] if from_zero else [])
    x_axis = nice_axis(min(0.0, *xs), max(xs), widen=False)
    y_axis = nice_axis(min(ys), max(ys))
    write: Callable[[float], str] = percent if unit == "%" else partial(compact, digits=digits)
    return tag(
        "figure",
        tag("figcaption", title, tag("small", note) if note else None),
        _legend([(s, p) for s, p in drawn if s.style != "faint"], write if last_values else None),
        tag("div",
            tag("div", *_ticks(y_axis, "bottom", unit), class_="y", aria_hidden="true"),
            tag("div", _drawing(title, drawn, x_axis, y_axis, write), class_="canvas", tabindex="0"),
            tag("div", *_ticks(x_axis, "left", "count"), tag("span", x_label, class_="axis"), class_="x",
                aria_hidden="true"),
            class_="plot"),
        class_="chart",
        data_chart=_readout(drawn, x_axis, write),
    )


def _drawing(
    title: str,
    drawn: Drawn,
    x_axis: Axis,
    y_axis: Axis,
    write: Callable[[float], str],
) -> Html:
    grid = "".join(f"M0 {SIZE * (1 - y_axis.place(tick)):.1f}H{SIZE:.0f}" for tick in y_axis.ticks)
    lines = [tag("path", d=_path(points, x_axis, y_axis), class_=f"{s.style} c{s.colour}")
             for s, points in sorted(drawn, key=lambda item: item[0].style != "faint")]
    summary = "; ".join(f"{s.name} from {write(p[0][1])} to {write(p[-1][1])}"
                        for s, p in drawn if s.style == "line")
    return tag("svg", tag("path", d=grid, class_="grid"), *lines, viewBox=f"0 0 {SIZE:.0f} {SIZE:.0f}",
               preserveAspectRatio="none", role="img", aria_label=f"{title}: {summary}" if summary else title)


def _path(points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> str:
    """Return path data; a lone point becomes a line of no length, which round caps show as a dot."""
    parts, pen_down = [], False
    for x, y in points:
        if not math.isfinite(y):
            pen_down = False
            continue
        at = f"{SIZE * x_axis.place(x):.1f} {SIZE * (1 - y_axis.place(y)):.1f}"
        parts.append(f"L{at}" if pen_down else f"M{at}L{at}")
        pen_down = True
    return "".join(parts)


def _ticks(axis: Axis, side: str, unit: str) -> list[Html]:
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else 1.0
    return [tag("span", tick_label(tick, step, unit), style=f"{side}:{100 * axis.place(tick):.2f}%")
            for tick in axis.ticks]


def tick_label(value: float, step: float, unit: str) -> str:
    """Return a tick's label, with as many decimals as its step needs.

    >>> tick_label(0.15, 0.05, "%"), tick_label(2.0, 0.5, ""), tick_label(150000, 50000, "count")
    ('15 %', '2.0', '150k')
    """
    if value == 0.0:
        return "0"
    if unit == "%":
        return percent(value, _decimals(100 * step))
    if unit == "count" or abs(value) >= 1e4 or step < 1e-3:
        return compact(value)
    return f"{value:.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    """Return the decimals of multiples of `step`, which is 1, 2, 2.5 or 5 times a power of ten."""
    return next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * step * 10**d), 6)


def _legend(drawn: Drawn, write: Callable[[float], str] | None) -> Html:
    items = [tag("li", tag("i", class_=f"{s.style} c{s.colour}"), s.name,
                 *((" ", tag("b", write(points[-1][1]))) if write is not None else ()))
             for s, points in drawn if math.isfinite(points[-1][1])]
    return tag("ul", *items, class_="legend")


def _readout(drawn: Drawn, x_axis: Axis, write: Callable[[float], str]) -> str:
    """Return what the cursor shows, as JSON: each line's name, colour, and points (place, x, y) in words."""
    values = [
        {"name": s.name, "colour": s.colour,
         "points": [[round(x_axis.place(x), 4), count(x), write(y)] for x, y in points if math.isfinite(y)]}
        for s, points in drawn if s.style == "line"
    ]
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))

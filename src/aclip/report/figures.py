"""Line charts as inline SVG.

The SVG stretches with the page; ticks and legend are HTML beside it, so that text keeps its size on any screen.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

from markupsafe import Markup

from aclip.report.page import compact, count, percent, render

SIZE, MAX_POINTS = 1000, 320  # units of the drawing, both ways; points of a line, more than a screen can show

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart; "faint" is for raw values behind a smoothed line, "dashed" for a reference."""

    name: str
    points: Sequence[tuple[float, float | None]]  # x ascending; a y that is None, NaN or infinite leaves a gap
    colour: int = 1  # index into the palette of style.css, 0 is grey
    style: Literal["line", "faint", "dashed"] = "line"

    @property
    def mark(self) -> str:
        return f"{self.style} c{self.colour}"


@dataclass(frozen=True)
class Axis:
    """A range [low, high], low < high, with ascending ticks inside it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def nice_axis(low: float, high: float, intervals: int = 4, widen: bool = True) -> Axis:
    """Return an axis around [low, high] whose ticks are multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
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
    # multiples carry binary dust: 0.30000000000000004 would be a label
    digits = max(0, 2 - math.floor(math.log10(step)))
    return Axis(low, high, tuple(round(i * step, digits) for i in range(first, last + 1)))


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> Points:
    """Return at most `limit` points: means of finite values over runs of neighbours, and the last point."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil((len(points) - 1) / (limit - 1))
    body = points[:-1]
    means = []
    for group in (body[i : i + size] for i in range(0, len(body), size)):
        finite = [y for _, y in group if math.isfinite(y)]
        means.append((sum(x for x, _ in group) / len(group), sum(finite) / len(finite) if finite else math.nan))
    return [*means, points[-1]]


def smooth(points: Sequence[tuple[float, float]], width: float = 0.015) -> Points:
    """Return the finite points averaged with weights exp(-distance / (width n)) to both sides, hence without lag."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    decay = math.exp(-1.0 / max(1.0, width * len(finite)))

    def one_sided(values: Sequence[float]) -> Points:  # decayed sums of the values so far, and of their weights
        return list(accumulate(((value, 1.0) for value in values),
                               lambda sums, new: (decay * sums[0] + new[0], decay * sums[1] + new[1])))

    ys = [y for _, y in finite]
    both = zip(finite, one_sided(ys), reversed(one_sided(ys[::-1])), strict=True)
    return [(x, (before + after - y) / (w + v - 1.0)) for (x, y), (before, w), (after, v) in both]


def line_chart(
    title: str, series: Sequence[Series], *, unit: Literal["", "%"] = "", from_zero: bool = False, digits: int = 3,
    note: str = "", x_label: str = "samples seen", last_values: bool = True,
) -> Markup:
    """Return a chart as a `<figure>`; series without a finite point are left out, and without any it is empty.

    Fractions in [0, 1] have the unit "%". `digits` are significant ones of the values in legend and cursor; the legend
    shows each line's last finite value unless `last_values` is off.
    """
    drawn = [(s, thin([(x, math.nan if y is None else y) for x, y in s.points])) for s in series]
    finite = {id(s): [(x, y) for x, y in points if math.isfinite(y)] for s, points in drawn}
    drawn = [(s, points) for s, points in drawn if finite[id(s)]]
    if not drawn:
        return Markup("")
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for s, _ in drawn for _, y in finite[id(s)]] + ([0.0] if from_zero else [])
    x_axis, y_axis = nice_axis(min(0.0, *xs), max(xs), widen=False), nice_axis(min(ys), max(ys))
    write: Callable[[float], str] = percent if unit == "%" else partial(compact, digits=digits)
    lines = [(s, finite[id(s)]) for s, _ in drawn if s.style == "line"]
    ends = "; ".join(f"{s.name} from {write(p[0][1])} to {write(p[-1][1])}" for s, p in lines)
    return render(
        "chart", title=title, note=note, x_label=x_label, size=SIZE,
        summary=f"{title}: {ends}" if ends else title,
        legend=[(s.name, s.mark, write(finite[id(s)][-1][1]) if last_values else "")
                for s, _ in drawn if s.style != "faint"],
        x_ticks=_ticks(x_axis, "count"), y_ticks=_ticks(y_axis, unit),
        grid="".join(f"M0 {SIZE * (1 - y_axis.place(tick)):.1f}H{SIZE}" for tick in y_axis.ticks),
        # faint lines first: they lie behind the others
        paths=[(_path(points, x_axis, y_axis), s.mark + " dot" * (len(finite[id(s)]) == 1))
               for s, points in sorted(drawn, key=lambda item: item[0].style != "faint")],
        readout=json.dumps(
            [{"name": s.name, "colour": s.colour, "points": [[round(x_axis.place(x), 4), count(x), write(y)]
                                                             for x, y in points]} for s, points in lines],
            ensure_ascii=False, separators=(",", ":")))


def tick_label(value: float, step: float, unit: str) -> str:
    if value == 0.0:
        return "0"
    if unit == "%":
        return percent(value, _decimals(100 * step))
    if unit == "count" or abs(value) >= 1e4 or (step < 1e-3 and abs(value) <= 100 * step):
        return compact(value)
    return f"{value:.{_decimals(step)}f}"


def _path(points: Points, x_axis: Axis, y_axis: Axis) -> str:
    # a lone point becomes a line of length 0, which round caps show as a dot
    parts, pen_down = [], False
    for x, y in points:
        if not math.isfinite(y):
            pen_down = False
            continue
        at = f"{SIZE * x_axis.place(x):.1f} {SIZE * (1 - y_axis.place(y)):.1f}"
        parts.append(f"L{at}" if pen_down else f"M{at}L{at}")
        pen_down = True
    return "".join(parts)


def _ticks(axis: Axis, unit: str) -> list[tuple[str, str]]:
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else 1.0
    return [(f"{100 * axis.place(tick):.2f}", tick_label(tick, step, unit)) for tick in axis.ticks]


def _decimals(step: float) -> int:
    return next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * step * 10**d), 6)

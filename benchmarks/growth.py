"""How time and memory of a training step grow: with patches kept, batch size, image size and model size.

    python benchmarks/growth.py                            some minutes on 2 CPU cores
    python benchmarks/growth.py --batch-size 64 --device cuda

Writes docs/images/growth.svg and prints its numbers as Markdown. ViT-B/16's tokens and depth at half of its width,
one of the four varied at a time; the points of a panel take their steps in turns. Forward pass, losses and backward
pass; dashed lines are the arithmetic, scaled to the time of `clip` at the panel's middle. Memory is what a step
takes, weights and optimizer state included (Linux, or CUDA).
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from aclip.config import override
from aclip.recipes import RECIPES
from aclip.report.figures import nice_axis, tick_label
from competitors import BATCHES, SIZES, WIDTHS, Ours, Settings, Stopwatch, peak_of, register_sizes
from step import CLOCKS, markdown

METHODS = {"clip": "#0b6cb0", "a-clip-eff": "#d55e00"}
PANELS = ("patches kept, %", "batch size", "image side, pixels", "width of the tower")
PANEL, GAP, LEFT, TOP = (210, 150), 66, 60, 34


@dataclass
class Point:
    """One step of one method at one size.

    Attributes:
        method: of `METHODS`. x: what is varied. build: returns the competitor.
        seconds, memory, macs: of a step; memory in bytes.
    """

    method: str
    x: float
    build: Callable[[], Ours]
    seconds: float = 0.0
    memory: int = 0
    macs: float = 0.0
    times: list[float] = field(default_factory=list)


def panels(settings: Settings) -> dict[str, list[Point]]:
    """Return the points of each panel."""
    def point(method: str, x: float, one: Settings, changes: Mapping[str, float] | None = None) -> Point:
        return Point(method, x, lambda: Ours(one, override(RECIPES[method], changes or {}), cut_text=True))

    size = settings.batch_size
    found: dict[str, list[Point]] = {
        "patches kept, %": [],
        "batch size": [point(m, n, replace(settings, batch_size=n)) for m in METHODS
                       for n in sorted({max(2, size // 4), max(2, size // 2), size, 2 * size})],
        "image side, pixels": [point(m, n, replace(settings, image_size=n))
                               for m in METHODS for n in (112, 160, 224, 288)],
        "width of the tower": [point(m, n, replace(settings, model=name))
                               for m in METHODS for name, n in WIDTHS.items()],
    }
    for kept in (25, 50, 75, 100):
        ratio = {"passes.masked.mask_ratio": 1 - kept / 100}
        found["patches kept, %"] += [
            point("a-clip-eff", kept, settings, ratio),
            replace(point("flip", kept, settings, ratio), method="clip")]
    return found


def measure(points: list[Point], rounds: int, watch: Stopwatch, advance: Callable[[], object]) -> None:
    """Take the steps of all points in turns, and then one of each for its memory."""
    competitors = [one.build() for one in points]
    for number in range(rounds + 1):
        for one, competitor in zip(points, competitors, strict=True):
            watch.seconds.clear()
            with watch.measure("step"):
                competitor.propagate(competitor.batches[number % BATCHES])
            competitor.optimize()
            competitor.average()
            if number > 0:
                one.times.append(watch.seconds["step"])
            advance()
    for one, competitor in zip(points, competitors, strict=True):
        one.seconds = statistics.median(one.times)
        one.memory = peak_of(competitor, partial(whole_step, competitor))
        lengths = torch.cat([batch.tokens.argmax(dim=1) + 1 for batch in competitor.batches]).float()
        one.macs = competitor.settings.batch_size * competitor.plan.macs(float(lengths.mean()))


def whole_step(competitor: Ours) -> None:
    """Take one step."""
    competitor.propagate(competitor.batches[0])
    competitor.optimize()
    competitor.average()


def drawing(found: dict[str, list[Point]]) -> str:
    """Return the SVG: a row of panels for time, and one for memory."""
    parts = []
    for column, (title, points) in enumerate(found.items()):
        clip = sorted((p for p in points if p.method == "clip"), key=lambda p: p.x)
        middle = clip[len(clip) // 2]
        scale = middle.seconds / middle.macs
        left = LEFT + column * (PANEL[0] + GAP)
        values: dict[str, Callable[[Point], float]] = {
            "seconds": lambda p: p.seconds, "GiB": lambda p: p.memory / 2**30}
        for row, (unit, value) in enumerate(values.items()):
            lines = [(METHODS[m], "", [(p.x, value(p)) for p in ordered(points, m)]) for m in METHODS]
            if unit == "seconds":
                lines += [(METHODS[m], "4 4", [(p.x, p.macs * scale) for p in ordered(points, m)]) for m in METHODS]
            parts.append(panel(left, TOP + row * (PANEL[1] + GAP), title, unit, lines))
    width, height = LEFT + len(found) * (PANEL[0] + GAP), TOP + 2 * (PANEL[1] + GAP)
    legend = "".join(
        f'<text x="{LEFT + 130 * i}" y="16" fill="{colour}">{"clip (flip)" if name == "clip" else name}</text>'
        for i, (name, colour) in enumerate(METHODS.items()))
    return svg(width, height, [legend, f'<text x="{LEFT + 260}" y="16" fill="#555">dashed: arithmetic</text>', *parts])


def svg(width: int, height: int, parts: Sequence[str]) -> str:
    """Return a drawing on white."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')


def ordered(points: list[Point], method: str) -> list[Point]:
    """Return a method's points from left to right."""
    return sorted((p for p in points if p.method == method), key=lambda p: p.x)


def panel(left: float, top: float, title: str, unit: str,
          lines: Sequence[tuple[str, str, list[tuple[float, float]]]], size: tuple[int, int] = PANEL) -> str:
    """Return one chart; axes begin at 0."""
    width, height = size
    xs, ys = zip(*[point for _, _, points in lines for point in points], strict=True)
    across, up = nice_axis(0.0, max(xs)), nice_axis(0.0, max(ys))

    def place(x: float, y: float) -> str:
        return f"{left + width * across.place(x):.1f},{top + height * (1 - up.place(y)):.1f}"

    parts = []
    for tick in up.ticks:
        y = top + height * (1 - up.place(tick))
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/><text x="{left - 6}" y="{y + 4:.1f}" '
                     f'text-anchor="end" fill="#555">{tick_label(tick, up.ticks[1], "")}</text>')
    for tick in across.ticks:
        parts.append(f'<text x="{left + width * across.place(tick):.1f}" y="{top + height + 16}" text-anchor="middle" '
                     f'fill="#555">{tick:g}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 34}" text-anchor="middle">{title}</text>'
                 f'<text x="{left}" y="{top - 6}" fill="#555">{unit}</text>')
    for colour, dash, points in lines:
        parts.append(f'<polyline points="{" ".join(place(x, y) for x, y in points)}" fill="none" stroke="{colour}" '
                     f'stroke-width="2" stroke-dasharray="{dash}"/>')
        if not dash:
            parts += [f'<circle cx="{place(x, y).split(",")[0]}" cy="{place(x, y).split(",")[1]}" r="3" '
                      f'fill="{colour}"/>' for x, y in points]
    return "".join(parts)


def main() -> None:
    """Measure, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="as of step.py")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "growth.svg")
    parser.add_argument("--size", choices=SIZES, default="half", help="of what is not varied")
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=PANELS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    register_sizes()
    device = torch.device(args.device)
    settings = Settings(SIZES[args.size], device, args.precision, False, args.batch_size, text_tokens=14.0)
    found = {title: points for title, points in panels(settings).items() if title in args.panels}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("steps", total=sum(map(len, found.values())) * (args.rounds + 1))
        for points in found.values():
            measure(points, args.rounds, Stopwatch(device, CLOCKS[args.clock]), lambda: progress.advance(task))
    args.output.write_text(drawing(found))
    rows = [[title, "flip" if p.method == "clip" and title.startswith("patches") else p.method, f"{p.x:g}",
             f"{1e3 * p.seconds:.0f} ({1e3 * min(p.times):.0f} to {1e3 * max(p.times):.0f})", f"{p.macs / 1e9:.1f}",
             f"{p.memory / 2**30:.2f}"]
            for title, points in found.items() for p in sorted(points, key=lambda p: (p.method != "clip", p.x))]
    columns = ["varied", "method", "to", "step, ms (lowest to highest)", "GMAC", "peak GiB"]
    Console(width=200).print(markdown(columns, rows), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

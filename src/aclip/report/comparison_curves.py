"""How the recipes of a comparison grew: against the pairs that they saw, and against their measured time."""

from collections.abc import Callable
from statistics import fmean

from aclip.report.charts import Series, line_chart
from aclip.report.comparison_files import ComparisonFiles, Results
from aclip.report.comparison_table import full_words
from aclip.report.markup import Html, tag
from aclip.report.outcomes import Metric
from aclip.report.run_files import Record, mapping, number, read_journals

COLOURS = 12

Points = list[tuple[float, float]]


def curves(comparison: ComparisonFiles) -> Html:
    """Return two charts of the metric that speaks for the recipes, each seed faint behind the mean of its recipe."""
    metric = comparison.primary()
    if metric is None:
        return tag("p", "Nothing has been measured yet.", class_="missing")
    histories = {one.name: [_history(comparison, run, metric) for run in one.runs] for one in comparison.results}
    clocks = {one.name: clock(comparison, one) for one in comparison.results}
    longest = max((clocks[one.name](1.0) for one in comparison.results if one.runs), default=0.0)
    unit, scale = ("seconds", 1.0) if longest < 300 else ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)
    by_samples: list[Series] = []
    by_time: list[Series] = []
    for i, one in enumerate(comparison.results):
        total = max(one.values("samples_seen"), default=0.0)
        timed = [[(clocks[one.name](x / total) / scale, y) for x, y in points] for points in histories[one.name]]
        colour = colour_of(i, one, comparison)
        by_samples += _series(one.name, histories[one.name], colour)
        by_time += _series(one.name, timed, colour)
    for lines in (by_samples, by_time):
        ends = [line.points[-1][0] for line in lines]
        level = _chance(comparison, metric)
        if ends and level is not None:
            lines.append(Series("chance", [(0.0, level), (max(ends), level)], 0, "dashed"))
    words = full_words(metric)
    charts = (
        line_chart(f"{words} by pairs seen", by_samples, unit="%", from_zero=True, note="mean; seeds behind it"),
        line_chart(f"{words} by time in training steps", by_time, unit="%", from_zero=True,
                   note="steps at their measured time", x_label=unit))
    return tag("div", *charts, class_="charts wide")


def colour_of(number_of: int, one: Results, comparison: ComparisonFiles) -> int:
    """Return a recipe's colour in the palette: grey for the baseline."""
    return 0 if one.name == comparison.baseline else 1 + number_of % COLOURS


def clock(comparison: ComparisonFiles, one: Results) -> Callable[[float], float]:
    """Return a function from the share of a run that is done to the seconds of its steps so far.

    Every stage of a run (small images, masked, unmasked) has its own measured step time.
    """
    steps = max(one.values("total_steps"), default=0.0)
    stages = mapping(mapping(comparison.raw, "timing"), "stages").get(one.name) or [
        {"share": 1.0, "seconds": one.step_seconds or 0.0}]

    def seconds(share: float) -> float:
        total = 0.0
        for stage in stages:
            part = min(max(share, 0.0), stage["share"])
            total, share = total + part * steps * stage["seconds"], share - part
        return total

    return seconds


def _history(comparison: ComparisonFiles, run: Record, metric: Metric) -> Points:
    """Return (samples seen, value) of a run's evaluations."""
    folder = comparison.path / "runs" / str(run["name"])
    if not folder.is_dir():
        return []
    held, evaluator, name = metric
    found: dict[float, float] = {}
    for record in read_journals(folder).evaluations:
        if (record.get("set"), record.get("evaluator"), record.get("weights")) == (held, evaluator, "online"):
            seen, value = number(record, "samples_seen"), number(mapping(record, "metrics"), name)
            if seen is not None and value is not None:
                found[seen] = value
    return sorted(found.items())


def _chance(comparison: ComparisonFiles, metric: Metric) -> float | None:
    """Return what a random order would reach, as the first run that was measured says."""
    held, evaluator, name = metric
    levels = (number(mapping(mapping(mapping(run, "chance"), held), evaluator), name)
              for one in comparison.results for run in one.runs)
    return next((level for level in levels if level is not None), None)


def _series(name: str, histories: list[Points], colour: int) -> list[Series]:
    """Return the seeds, and their mean where all of them were evaluated."""
    histories = [points for points in histories if points]
    if not histories:
        return []
    if len(histories) == 1:
        return [Series(name, histories[0], colour)]
    common = set.intersection(*({x for x, _ in points} for points in histories))
    values = [dict(points) for points in histories]
    mean = [(x, fmean(v[x] for v in values)) for x in sorted(common)]
    return [*(Series(name, points, colour, "faint") for points in histories), Series(name, mean, colour)]

"""The tables of a comparison: mean and standard deviation over seeds; as Markdown, CSV and for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from aclip.report.journals import Metric, Record, mapping, number
from aclip.report.page import MISSING, compact, count, duration, gigabytes

if TYPE_CHECKING:  # pandas takes long to import
    from pandas import DataFrame
    from rich.table import Table

_WORDS = {"image_to_text": "to caption", "text_to_image": "to image", "median_rank": "median rank",
          "top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}


@dataclass(frozen=True)
class Results:
    """The finished runs of one recipe.

    Attributes:
        name: of the recipe.
        lr: learning rate of its runs, chosen or given; None before it is known.
        runs: those that count, as in `comparison.json`, by seed.
        search: all runs with the first seed, of every learning rate that was tried.
        step_seconds: median time of a step.
        relative_time: the same relative to the baseline, measured in turns with it.
        macs: multiply-accumulates for a pair in a training step.
        relative_cost: the same relative to the baseline.
    """

    name: str
    lr: float | None
    runs: list[Record]
    search: list[Record]
    step_seconds: float | None
    relative_time: float | None
    macs: float | None
    relative_cost: float | None

    def values(self, key: str) -> list[float]:
        """Return a number of the counted runs, of those that have it."""
        return [value for run in self.runs if (value := number(run, key)) is not None]


def pooled_spread(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return sqrt(((n - 1) s^2 + (m - 1) t^2) / (n + m - 2)), s and t the sample standard deviations of n and m values.

    None where either has fewer than two values.
    """
    if len(first) < 2 or len(second) < 2:
        return None
    squares = sum((x - fmean(values)) ** 2 for values in (first, second) for x in values)
    return float((squares / (len(first) + len(second) - 2)) ** 0.5)


def exceeds_spread(first: Sequence[float], second: Sequence[float]) -> bool | None:
    """Return whether |mean - mean| > 2 x `pooled_spread`, or None where that is unknown."""
    pooled = pooled_spread(first, second)
    return None if pooled is None else abs(fmean(first) - fmean(second)) > 2.0 * pooled


def scores(results: Sequence[Results], sets: Sequence[str]) -> "DataFrame":
    """Return what was measured: one row for each recipe, set, evaluator and metric.

    Returns:
        A frame with columns recipe, set, evaluator, metric, mean, standard_deviation (of the sample; NaN of a single
        value), n, and values, the list over seeds. Sets in their order, recipes in theirs.
    """
    rows = [(one.name, held, evaluator, metric, value) for one in results for run in one.runs
            for held, evaluators in mapping(run, "metrics").items() for evaluator, measured in evaluators.items()
            for metric in measured if (value := number(measured, metric)) is not None]
    return _statistics(sorted(rows, key=lambda row: sets.index(row[1]) if row[1] in sets else len(sets)))


def metrics_of(frame: "DataFrame") -> dict[tuple[str, str], list[Metric]]:
    """Return the metrics in a frame of `scores` by set and evaluator."""
    found: dict[tuple[str, str], list[Metric]] = {}
    for metric in dict.fromkeys(zip(frame["set"], frame["evaluator"], frame["metric"], strict=True)):
        found.setdefault(metric[:2], []).append(metric)
    return found


def cells(results: Sequence[Results], frame: "DataFrame", metrics: dict[Metric, str]) -> "DataFrame":
    """Return a row for each recipe with mean ± standard deviation of some metrics as text, fractions in per cent.

    Args:
        results: the recipes.
        frame: their `scores`.
        metrics: metric -> title of its column.
    """
    from pandas import DataFrame

    runs = {one.name: len(one.runs) for one in results}
    table = DataFrame(MISSING, index=list(runs), columns=list(metrics.values()), dtype=object)
    for row in frame.itertuples(index=False):
        metric = (row.set, row.evaluator, row.metric)
        if metric in metrics:
            scale, unit = (100.0, " %") if is_fraction(metric) else (1.0, "")
            spread = f" ± {scale * row.standard_deviation:.1f}" if row.n > 1 else ""
            some = f" (n = {row.n})" if row.n < runs[row.recipe] else ""
            table.loc[row.recipe, metrics[metric]] = f"{scale * row.mean:.1f}{spread}{unit}{some}"
    return table.rename_axis("recipe").reset_index()


def costs(results: Sequence[Results], baseline: str, *, brief: bool = False) -> "DataFrame":
    """Return samples, time, arithmetic and memory as text, a row for each recipe.

    Args:
        results: the recipes.
        baseline: the recipe that ratios are relative to.
        brief: time and arithmetic relative to the baseline, and memory, alone.
    """
    from pandas import DataFrame

    table = DataFrame({
        "recipe": [one.name for one in results],
        "samples": [count(_mean(one.values("samples_seen"))) for one in results],
        "training": [duration(_mean(one.values("training_seconds"))) for one in results],
        "step": [milliseconds(one.step_seconds) for one in results],
        f"time / {baseline}": [ratio(one.relative_time) for one in results],
        "GMAC a pair": [compact(None if one.macs is None else one.macs / 1e9) for one in results],
        f"MACs / {baseline}": [ratio(one.relative_cost) for one in results],
        "memory": [gigabytes(max(one.values("peak_memory"), default=None)) for one in results],
    }, dtype=object)
    return table.drop(columns=["samples", "training", "step", "GMAC a pair"]) if brief else table


def is_fraction(metric: Metric) -> bool:
    """Return whether a metric lies in [0, 1]: all do but ranks and nats."""
    return "rank" not in metric[2] and metric[2] != "nll"


def metric_words(name: str) -> str:
    """Return a metric in words.

    >>> metric_words("image_to_text_r1"), metric_words("text_to_image_median_rank"), metric_words("top1")
    ('R@1 to caption', 'median rank to image', 'top-1')
    """
    for direction in ("image_to_text", "text_to_image"):
        if name.startswith(f"{direction}_"):
            rest = name.removeprefix(f"{direction}_")
            return f"{f'R@{rest[1:]}' if rest[1:].isdigit() else _WORDS.get(rest, rest)} {_WORDS[direction]}"
    return _WORDS.get(name, name)


def full_words(metric: Metric, *, with_set: bool = True) -> str:
    """Return a metric in words, with its set and, unless it is retrieval, its evaluator.

    >>> full_words(("val", "retrieval", "image_to_text_r1")), full_words(("val", "linear_probe", "top1"))
    ('val R@1 to caption', 'val linear probe top-1')
    """
    held, evaluator, name = metric
    words = [held] if with_set else []
    return " ".join([*words, *([] if evaluator == "retrieval" else [evaluator.replace("_", " ")]), metric_words(name)])


def ratio(value: float | None) -> str:
    """Return a ratio with two decimals."""
    return MISSING if value is None else f"{value:.2f}"


def milliseconds(value: float | None) -> str:
    """Return seconds as milliseconds."""
    return MISSING if value is None else f"{compact(1e3 * value)} ms"


def to_csv(results: Sequence[Results], sets: Sequence[str]) -> str:
    """Return plain numbers: one line for each recipe and metric with mean, standard deviation and every seed's value."""
    from pandas import concat

    rows = [(one.name, "", "", key, value) for one in results
            for key in ("samples_seen", "training_seconds", "peak_memory") for value in one.values(key)]
    rows += [(one.name, "", "", key, value) for one in results
             for key in ("step_seconds", "relative_time", "macs", "relative_cost", "lr")
             if (value := getattr(one, key)) is not None]
    order = {one.name: i for i, one in enumerate(results)}
    table = concat([scores(results, sets), _statistics(rows)])
    table = table.sort_values("recipe", key=lambda names: names.map(order), kind="stable")
    table["values"] = table["values"].map(lambda values: " ".join(map(str, values)))
    return str(table.to_csv(index=False, lineterminator="\n"))


def to_markdown(table: "DataFrame") -> str:
    """Return a table of text as GitHub's Markdown, numbers aligned to the right."""
    head = list(table.columns)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *table.to_numpy().tolist()]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def to_rich(table: "DataFrame") -> "Table":
    """Return a table of text for the terminal."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for i, name in enumerate(table.columns):
        shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in table.to_numpy().tolist():
        shown.add_row(*(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in row))
    return shown


def _statistics(rows: Sequence[tuple[str, str, str, str, float]]) -> "DataFrame":
    from pandas import DataFrame

    keys = ["recipe", "set", "evaluator", "metric"]
    frame = DataFrame(rows, columns=[*keys, "value"]).astype({"value": float})
    grouped = frame.groupby(keys, sort=False)["value"]
    return grouped.agg(mean="mean", standard_deviation="std", n="count", values=list).reset_index()


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None

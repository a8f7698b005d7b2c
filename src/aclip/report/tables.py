"""The tables of a comparison: mean and standard deviation over seeds; as Markdown, CSV and for the terminal."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from aclip.files import write_atomically
from aclip.report.journals import PRIMARY, Metric, Record, mapping, number
from aclip.report.page import MISSING, compact, count, duration, gigabytes, milliseconds, ratio

if TYPE_CHECKING:  # pandas takes long to import
    from pandas import DataFrame
    from rich.table import Table

ACCURACIES = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
_WORDS = {"image_to_text": "to caption", "text_to_image": "to image", "median_rank": "median rank", **ACCURACIES}


class Tables:
    """The results of a comparison (`comparison.json`), as numbers over seeds and as tables of text.

    Attributes:
        runs: of each recipe, in the order asked for, the finished ones that count, by seed.
        frame: a row for each recipe, set, evaluator and metric; columns mean, standard_deviation (of the sample, NaN of
            a single value), max, n, and values, the list over seeds. Costs have no set and no evaluator.
        metrics: (set, evaluator) -> its metrics, in the order of the sets; the first of each leads.
    """

    def __init__(self, raw: Record) -> None:
        self.raw, self.recipes = raw, list(mapping(raw, "recipes"))
        counted = sorted((run for run in raw.get("runs") or [] if run.get("finished") and run.get("counts")),
                         key=lambda run: int(run["seed"]))
        self.runs = {name: [run for run in counted if run.get("recipe") == name] for name in self.recipes}
        self.baseline = str(raw.get("baseline", "clip"))
        self.sets = [str(name) for name in raw.get("sets") or []]
        self.frame = self._statistics(raw)
        rows = self.frame.to_dict("records")
        self._rows: dict[tuple[str, Metric], Any] = {
            (row["recipe"], (row["set"], row["evaluator"], row["metric"])): row for row in rows}
        found = dict.fromkeys(metric for _, metric in self._rows if metric[0])
        self.metrics: dict[tuple[str, str], list[Metric]] = {}
        for metric in sorted(found, key=lambda metric: self.sets.index(metric[0])):
            self.metrics.setdefault(metric[:2], []).append(metric)

    def primary(self) -> Metric | None:
        found = [metric for metrics in self.metrics.values() for metric in metrics]
        wanted = ((held, *metric) for held in self.sets for metric in PRIMARY.items())
        return next((metric for metric in wanted if metric in found), None)

    def values(self, recipe: str, metric: Metric) -> list[float]:
        row = self._rows.get((recipe, metric))
        return [] if row is None else list(row["values"])

    def cost(self, recipe: str, key: str, statistic: str = "mean") -> float | None:
        row = self._rows.get((recipe, ("", "", key)))
        return None if row is None else float(row[statistic])

    def cell(self, recipe: str, metric: Metric) -> str:
        row, (scale, unit) = self._rows.get((recipe, metric)), (100.0, " %") if is_fraction(metric[2]) else (1.0, "")
        if row is None:
            return MISSING
        spread = f" ± {scale * row['standard_deviation']:.1f}" if row["n"] > 1 else ""
        some = f" (n = {row['n']})" if row["n"] < len(self.runs[recipe]) else ""
        return f"{scale * row['mean']:.1f}{spread}{unit}{some}"

    def summary(self, *, brief: bool = False) -> "DataFrame":
        several = len(self.sets) > 1
        columns = {full_words(metrics[0], with_set=several): partial(self.cell, metric=metrics[0])
                   for metrics in self.metrics.values()}
        return self._table(columns | self._costs(brief=brief) | {
            "lr": lambda recipe: MISSING if (lr := self.cost(recipe, "lr")) is None else f"{lr:g}",
            "seeds": lambda recipe: str(len(self.runs[recipe]))})

    def details(self) -> "dict[str, DataFrame]":
        found = {}
        for (held, evaluator), metrics in self.metrics.items():
            table = self._table({metric_words(metric[2]): partial(self.cell, metric=metric) for metric in metrics})
            found[f"{held}, {evaluator.replace('_', ' ')}"] = table[(table.iloc[:, 1:] != MISSING).any(axis=1)]
        return found

    def costs(self) -> "DataFrame":
        return self._table(self._costs())

    def write(self, folder: Path) -> None:
        parts = [_markdown(self.summary()), *(f"## {title}\n\n{_markdown(table)}"
                                              for title, table in self.details().items())]
        write_atomically(folder / "table.md", "\n".join(parts))
        joined = self.frame["values"].map(lambda values: " ".join(map(str, values)))
        table = self.frame.assign(values=joined).drop(columns="max")
        write_atomically(folder / "table.csv", table.to_csv(index=False, lineterminator="\n"))

    def _costs(self, *, brief: bool = False) -> dict[str, Callable[[str], str]]:
        columns: dict[str, tuple[Callable[[Any], str], str, str]] = {
            "samples": (count, "samples_seen", "mean"), "training": (duration, "training_seconds", "mean"),
            "step": (milliseconds, "step_seconds", "mean"), f"time / {self.baseline}": (ratio, "relative_time", "mean"),
            "GMAC a pair": (lambda macs: compact(None if macs is None else macs / 1e9), "macs", "mean"),
            f"MACs / {self.baseline}": (ratio, "relative_cost", "mean"), "memory": (gigabytes, "peak_memory", "max")}
        return {title: lambda recipe, write=write, of=of: write(self.cost(recipe, *of))  # type: ignore[misc]
                for title, (write, *of) in columns.items() if not brief or "/" in title or title == "memory"}

    def _table(self, columns: dict[str, Callable[[str], str]]) -> "DataFrame":
        from pandas import DataFrame

        return DataFrame({"recipe": self.recipes, **{title: [write(recipe) for recipe in self.recipes]
                                                     for title, write in columns.items()}}, dtype=object)

    def _statistics(self, raw: Record) -> "DataFrame":
        from pandas import DataFrame

        rows: list[tuple[str, str, str, str, float | None]] = []
        timing = mapping(raw, "timing")
        for name, runs in self.runs.items():
            rows += [(name, held, evaluator, metric, number(measured, metric))
                     for held in self.sets for run in runs
                     for evaluator, measured in mapping(mapping(run, "metrics"), held).items() for metric in measured]
            rows += [(name, "", "", key, number(run, key))
                     for key in ("samples_seen", "training_seconds", "peak_memory") for run in runs]
            about = mapping(mapping(raw, "recipes"), name)
            rows += [(name, "", "", key, number(record, of)) for key, record, of in (
                ("step_seconds", mapping(timing, "step_seconds"), name),
                ("relative_time", mapping(timing, "relative"), name), ("macs", about, "macs"),
                ("relative_cost", about, "relative_cost"), ("lr", mapping(mapping(raw, "chosen_lr"), name), "lr"))]
        keys = ["recipe", "set", "evaluator", "metric"]
        frame = DataFrame([row for row in rows if row[-1] is not None], columns=[*keys, "value"])
        grouped = frame.astype({"value": float}).groupby(keys, sort=False)["value"]
        return grouped.agg(mean="mean", standard_deviation="std", max="max", n="count", values=list).reset_index()


def pooled_spread(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return sqrt(((n - 1) s^2 + (m - 1) t^2) / (n + m - 2)), s and t the standard deviations of n and m > 1 values."""
    if len(first) < 2 or len(second) < 2:
        return None
    squares = sum((x - fmean(values)) ** 2 for values in (first, second) for x in values)
    return float((squares / (len(first) + len(second) - 2)) ** 0.5)


def exceeds_spread(first: Sequence[float], second: Sequence[float]) -> bool | None:
    """Return whether |mean - mean| > 2 x `pooled_spread`, or None where that is unknown."""
    pooled = pooled_spread(first, second)
    return None if pooled is None else abs(fmean(first) - fmean(second)) > 2.0 * pooled


def is_fraction(metric: str) -> bool:
    """Return whether a metric is shown in percent; one of a user's own evaluator is not, unless it is called so."""
    return re.search(r"(_r|top)\d+$|(^|_)(accuracy|mean_per_class|ece|confidence)$", metric) is not None


def change(value: float | None, start: float | None, fraction: bool) -> str:
    """Return how far a metric is from what it was at the start, in brackets, fractions in points; "" if unknown."""
    if value is None or start is None:
        return ""
    return f" ({100 * (value - start):+.1f})" if fraction else f" ({value - start:+.4g})"


def metric_words(name: str) -> str:
    """Return a metric in words, such as "R@1 to caption", "median rank to image", "top-1"."""
    for direction in ("image_to_text", "text_to_image"):
        if name.startswith(f"{direction}_"):
            rest = name.removeprefix(f"{direction}_")
            return f"{f'R@{rest[1:]}' if rest[1:].isdigit() else _WORDS.get(rest, rest)} {_WORDS[direction]}"
    return _WORDS.get(name, name)


def full_words(metric: Metric, *, with_set: bool = True) -> str:
    """Return a metric in words, with its set and, unless it is retrieval, its evaluator: "val linear probe top-1"."""
    held, evaluator, name = metric
    words = [*([held] if with_set else []), *([] if evaluator == "retrieval" else [evaluator.replace("_", " ")])]
    return " ".join([*words, metric_words(name)])


def to_rich(table: "DataFrame") -> "Table":
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for i, name in enumerate(table.columns):
        shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in table.to_numpy():
        shown.add_row(*(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in row))
    return shown


def _markdown(table: "DataFrame") -> str:
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.to_numpy()]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

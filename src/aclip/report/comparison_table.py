"""The tables of a comparison: one row a recipe; as Markdown, CSV and for the terminal."""

import csv
import io
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from rich.table import Table

from aclip.report.comparison_files import ComparisonFiles, Results
from aclip.report.formats import MISSING, compact, count, duration
from aclip.report.outcomes import Metric, spread

_WORDS = {"image_to_text": "to caption", "text_to_image": "to image", "median_rank": "median rank",
          "top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}

Rows = tuple[list[str], list[list[str]]]
"""Column titles, and a row for every recipe."""

Column = tuple[str, Callable[[Results], str]]
"""A title, and what stands below it."""


def summary_rows(comparison: ComparisonFiles, *, brief: bool = False) -> Rows:
    """Return what leads: of every set and evaluator the first metric, then cost, learning rate and number of seeds.

    Args:
        comparison: what was read.
        brief: of the cost only time and arithmetic relative to the baseline, and memory.
    """
    columns = [_metric_column(metric, comparison) for metric in leading(comparison)]
    return _rows(comparison, columns + _cost_columns(comparison, brief=brief) + [
        ("lr", lambda one: MISSING if one.lr is None else f"{one.lr:g}"),
        ("seeds", lambda one: str(len(one.runs))),
    ])


def cost_rows(comparison: ComparisonFiles) -> Rows:
    """Return samples, time, arithmetic and memory."""
    return _rows(comparison, _cost_columns(comparison))


def detail_rows(comparison: ComparisonFiles, metrics: Sequence[Metric]) -> Rows:
    """Return mean and spread of these metrics, of one set and evaluator, for every recipe that was measured so."""
    columns = [(metric_words(name), partial(metric_cell, metric=(held, evaluator, name)))
               for held, evaluator, name in metrics]
    head, body = _rows(comparison, columns)
    return head, [row for row in body if any(cell != MISSING for cell in row[1:])]


def groups(comparison: ComparisonFiles) -> dict[tuple[str, str], list[Metric]]:
    """Return the metrics by set and evaluator."""
    found: dict[tuple[str, str], list[Metric]] = {}
    for metric in comparison.metrics:
        found.setdefault(metric[:2], []).append(metric)
    return found


def leading(comparison: ComparisonFiles) -> list[Metric]:
    """Return the first metric of each set and evaluator."""
    return [metrics[0] for metrics in groups(comparison).values()]


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


def full_words(metric: Metric) -> str:
    """Return a metric in words, with its set and, where it is not retrieval, its evaluator.

    >>> full_words(("val", "retrieval", "image_to_text_r1")), full_words(("val", "linear_probe", "top1"))
    ('val R@1 to caption', 'val linear probe top-1')
    """
    held, evaluator, name = metric
    return " ".join([held, *([] if evaluator == "retrieval" else [evaluator.replace("_", " ")]), metric_words(name)])


def is_share(metric: Metric) -> bool:
    """Return whether a metric is a share in [0, 1]: all are but ranks and nats."""
    return "rank" not in metric[2] and metric[2] != "nll"


def metric_cell(one: Results, metric: Metric) -> str:
    """Return mean and sample standard deviation over the seeds, shares in per cent; a single value has no deviation."""
    values = one.metrics.get(metric, [])
    if not values:
        return MISSING
    scale, unit = (100.0, " %") if is_share(metric) else (1.0, "")
    deviation = spread(values)
    of_some = f" (n = {len(values)})" if len(values) < len(one.runs) else ""
    return f"{scale * fmean(values):.1f}{'' if deviation is None else f' ± {scale * deviation:.1f}'}{unit}{of_some}"


def ratio(value: float | None) -> str:
    """Return a ratio with two decimals."""
    return MISSING if value is None else f"{value:.2f}"


def milliseconds(value: float | None) -> str:
    """Return seconds as milliseconds."""
    return MISSING if value is None else f"{compact(1e3 * value)} ms"


def gigabytes(value: float | None) -> str:
    """Return bytes as GB, 10^9."""
    return MISSING if value is None else f"{value / 1e9:.2f} GB"


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None of no values."""
    return fmean(values) if values else None


def to_rich(comparison: ComparisonFiles) -> Table:
    """Return the summary for the terminal."""
    head, body = summary_rows(comparison, brief=True)
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in body:
        table.add_row(*(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in row))
    return table


def to_markdown(comparison: ComparisonFiles) -> str:
    """Return the summary, and a table of all metrics for each set and evaluator, as GitHub's Markdown."""
    parts = [_markdown(*summary_rows(comparison))]
    for (held, evaluator), metrics in groups(comparison).items():
        parts.append(f"## {held}, {evaluator.replace('_', ' ')}\n\n{_markdown(*detail_rows(comparison, metrics))}")
    return "\n".join(parts)


def to_csv(comparison: ComparisonFiles) -> str:
    """Return plain numbers: one line a recipe and metric, with mean, sample standard deviation and every seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["recipe", "set", "evaluator", "metric", "mean", "standard_deviation", "n", "values"])
    for one in comparison.results:
        lines = [(metric, values) for metric, values in one.metrics.items()]
        lines += [(("", "", key), one.values(key)) for key in ("samples_seen", "training_seconds", "peak_memory")]
        lines += [(("", "", key), [value]) for key in ("step_seconds", "relative_time", "macs", "relative_cost", "lr")
                  if (value := getattr(one, key)) is not None]
        for metric, values in lines:
            if values:
                deviation = spread(values)
                writer.writerow([one.name, *metric, fmean(values), "" if deviation is None else deviation, len(values),
                                 " ".join(map(str, values))])
    return out.getvalue()


def _cost_columns(comparison: ComparisonFiles, *, brief: bool = False) -> list[Column]:
    columns: list[tuple[Column, bool]] = [
        (("samples", lambda one: count(mean(one.values("samples_seen")))), False),
        (("training", lambda one: duration(mean(one.values("training_seconds")))), False),
        (("step", lambda one: milliseconds(one.step_seconds)), False),
        ((f"time / {comparison.baseline}", lambda one: ratio(one.relative_time)), True),
        (("GMAC a pair", lambda one: compact(one.macs / 1e9 if one.macs is not None else None)), False),
        ((f"MACs / {comparison.baseline}", lambda one: ratio(one.relative_cost)), True),
        (("memory", lambda one: gigabytes(max(one.values("peak_memory"), default=None))), True),
    ]
    return [column for column, leads in columns if leads or not brief]


def _metric_column(metric: Metric, comparison: ComparisonFiles) -> Column:
    title = full_words(metric) if len(comparison.sets) > 1 else full_words(metric).removeprefix(f"{metric[0]} ")
    return title, partial(metric_cell, metric=metric)


def _rows(comparison: ComparisonFiles, columns: Sequence[Column]) -> Rows:
    head = ["recipe", *(name for name, _ in columns)]
    return head, [[one.name, *(write(one) for _, write in columns)] for one in comparison.results]


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

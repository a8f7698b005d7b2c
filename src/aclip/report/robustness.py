"""Accuracy as a function of the patches kept: what attentive inference costs, and what it saves."""

from collections.abc import Mapping

from aclip.report.charts import Series, line_chart
from aclip.report.formats import MISSING, compact, count, percent
from aclip.report.markup import Html, join, table, tag
from aclip.report.outcomes import PRIMARY
from aclip.report.run_files import Record, RunFiles, mapping, number


def robustness(run: RunFiles) -> Html:
    """Return a curve a set and evaluator, a line a way of choosing, and the numbers with the speed."""
    curves: dict[tuple[str, str, str], dict[str, dict[float, Record]]] = {}
    for record in run.robustness:  # later ones take the place of earlier ones
        keep = number(record, "keep")
        if keep is not None and str(record.get("evaluator")) in dict(PRIMARY):
            who = (str(record.get("set")), str(record.get("evaluator")), str(record.get("weights")))
            curves.setdefault(who, {}).setdefault(str(record.get("kept_by")), {})[keep] = record
    charts, rows = [], []
    for (name, evaluator, weights), ways in curves.items():
        metric = dict(PRIMARY)[evaluator]
        whole = {keep: record for records in ways.values() for keep, record in records.items() if keep == 1.0}
        series = [Series(way, _points(records | whole, metric), colour)
                  for colour, (way, records) in enumerate(ways.items(), start=1)]
        charts.append(line_chart(name, series, unit="%", from_zero=True, x_label="% of the patches kept",
                                 note=f"{evaluator.replace('_', ' ')}, {_words(metric)}, {weights} weights",
                                 last_values=False))  # at 100 % all are the same
        rows += [_row(name, evaluator, metric, record) for records in ways.values() for record in records.values()]
    if not charts:
        return tag("p", "Not measured: aclip evaluate --keep 1 0.75 0.5 0.25 does.", class_="missing")
    head = ["set", "evaluator", "kept", "by", "value", "patches", "pictures / s"]
    return join(tag("div", *charts, class_="charts"), table(head, rows, numeric_from=4))


def _points(records: Mapping[float, Record], metric: str) -> list[tuple[float, float]]:
    values = ((100.0 * keep, number(mapping(record, "metrics"), metric)) for keep, record in sorted(records.items()))
    return [(x, y) for x, y in values if y is not None]


def _row(name: str, evaluator: str, metric: str, record: Record) -> list[str]:
    keep = number(record, "keep")
    way = str(record.get("kept_by")) if keep != 1.0 else MISSING
    patches = f"{count(number(record, 'num_keep'))} of {count(number(record, 'num_patches'))}"
    return [name, f"{evaluator.replace('_', ' ')}, {_words(metric)}", percent(keep), way,
            percent(number(mapping(record, "metrics"), metric)), patches,
            compact(number(record, "pictures_per_second"))]


def _words(metric: str) -> str:
    return {"image_to_text_r1": "image → caption R@1", "top1": "top-1"}.get(metric, metric)

"""How training went: loss, schedules, gradients, throughput."""

import math
from collections.abc import Sequence

from aclip.report.charts import Series, line_chart, smooth
from aclip.report.markup import Html, tag
from aclip.report.run_files import Record, RunFiles, mapping, number

Points = list[tuple[float, float]]


def curves(run: RunFiles) -> Html:
    """Return the charts of `metrics.jsonl`; what a recipe does not log is left out."""
    records = run.metrics
    if not records:
        return tag("p", "No training step has been logged yet.", class_="missing")
    names = list(dict.fromkeys(name for record in records for name in mapping(record, "parts")))
    # Placed like their step: a part knows its value alone.
    parts = [mapping(r, "parts") | {"samples_seen": r.get("samples_seen")} for r in records]
    main = [line_chart("Loss", _smoothed("weighted sum", _points(records, "loss"), 1),
                       note="smoothed; raw values behind it")]
    terms = [line for i, name in enumerate(names)
             for line in _smoothed(name, _points(parts, name), 1 + i % 6)]
    terms.append(Series("chance", _points(records, "chance_loss"), 0, "dashed"))
    main.append(line_chart("Terms of the loss", terms,
                           note="unweighted; chance is what guessing gives in the contrastive term: ln(batch size), "
                                "or less where captions are equal"))
    small = [
        line_chart("Learning rate", [Series("learning rate", _points(records, "lr"))], from_zero=True),
        line_chart("EMA momentum", [Series("momentum", _points(records, "ema_momentum"), 3)], digits=5),
        line_chart("Logit scale", [Series("logit scale", _points(records, "logit_scale"), 4)]),
        line_chart("Gradient norm", _smoothed("gradient norm", _points(records, "grad_norm"), 2),
                   from_zero=True),
        line_chart("Throughput", _smoothed("samples / s", _points(records, "samples_per_second"), 3),
                   from_zero=True),
        line_chart("Waiting for data", _smoothed("share of the time", _points(records, "data_wait"), 5),
                   unit="%", from_zero=True),
    ]
    return Html(tag("div", *main, class_="charts wide") + tag("div", *small, class_="charts"))


def _points(records: Sequence[Record], key: str) -> Points:
    """Return (samples seen, value); a value that is there but not finite stays as a gap."""
    points = []
    for record in records:
        x = number(record, "samples_seen")
        if x is not None and record.get(key) is not None:
            y = number(record, key)
            points.append((x, math.nan if y is None else y))
    return points


def _smoothed(name: str, points: Points, colour: int) -> list[Series]:
    if len(points) < 12:
        return [Series(name, points, colour)]
    return [Series(name, points, colour, "faint"), Series(name, smooth(points), colour)]

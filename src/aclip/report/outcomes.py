"""What came out of one run of a comparison, and what many of them say together."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from aclip.report.run_files import Record, mapping, number, read_journals

PRIMARY = (("retrieval", "image_to_text_r1"), ("zero_shot", "top1"), ("linear_probe", "top1"), ("knn", "top1"))
"""Evaluator and metric: the first of these that was measured on a set speaks for a run."""

Metric = tuple[str, str, str]
"""Set, evaluator, name of the metric."""


def outcome(folder: Path) -> Record:
    """Return what a run's folder says about its end, as plain JSON values.

    Returns:
        `samples_seen` and `steps` so far; `training_seconds` of the steps, evaluation aside; `peak_memory` in bytes;
        `metrics` and `chance`, each set name -> evaluator -> metric -> value, of the last evaluation of the trained
        weights. What is not known is None, or missing among the metrics.
    """
    run = read_journals(folder)
    # a last step that was skipped has no line among the metrics, and is evaluated all the same
    last = max([*run.metrics[-1:], *run.evaluations], key=lambda record: number(record, "step") or 0, default={})
    steps = number(last, "step")
    metrics: dict[str, dict[str, Record]] = {}
    chance: dict[str, dict[str, Record]] = {}
    for record in run.evaluations:
        if record.get("weights") == "online" and number(record, "step") == steps:
            name, evaluator = str(record.get("set")), str(record.get("evaluator"))
            metrics.setdefault(name, {})[evaluator] = mapping(record, "metrics")
            chance.setdefault(name, {})[evaluator] = mapping(record, "chance")
    return {"samples_seen": number(last, "samples_seen"), "steps": steps, "training_seconds": run.training_seconds(),
            "peak_memory": _peak_memory(folder), "metrics": metrics, "chance": chance}


def primary(result: Record, sets: Sequence[str]) -> tuple[Metric, float] | None:
    """Return the metric that speaks for a run, and its value, or None if nothing does.

    The first of `PRIMARY` on the first set where any of them was measured.
    """
    for name in sets:
        measured = mapping(mapping(result, "metrics"), name)
        for evaluator, metric in PRIMARY:
            value = number(mapping(measured, evaluator), metric)
            if value is not None:
                return (name, evaluator, metric), value
    return None


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, sqrt(sum (x - mean)^2 / (n - 1)), or None for fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def pooled_spread(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return sqrt(((n - 1) s^2 + (m - 1) t^2) / (n + m - 2)), s and t the sample standard deviations of n and m values.

    None where either has fewer than two values: no spread is known then.
    """
    if len(first) < 2 or len(second) < 2:
        return None
    squares = sum((x - fmean(values)) ** 2 for values in (first, second) for x in values)
    return float((squares / (len(first) + len(second) - 2)) ** 0.5)


def exceeds_spread(first: Sequence[float], second: Sequence[float]) -> bool | None:
    """Return whether |mean - mean| > 2 x `pooled_spread`, or None where no spread is known."""
    pooled = pooled_spread(first, second)
    return None if pooled is None else abs(fmean(first) - fmean(second)) > 2.0 * pooled


def _peak_memory(folder: Path) -> float | None:
    try:
        return number(json.loads((folder / "memory.json").read_text()), "peak_memory")
    except (OSError, ValueError, AttributeError):
        return None

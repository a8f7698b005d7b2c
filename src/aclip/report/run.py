"""The report of a run: `report.html`, one file that needs nothing else and makes no request."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from aclip.errors import category
from aclip.files import as_file_name
from aclip.report.figures import Points, Series, line_chart, smooth
from aclip.report.journals import PRIMARY, Record, RunFiles, at_start, mapping, number, read_run
from aclip.report.page import MISSING, compact, count, percent, write_page
from aclip.report.tables import ACCURACIES, change, is_fraction

DIRECTIONS = {"image_to_text": "image → caption", "text_to_image": "caption → image"}
CLASSIFIERS = {"zero_shot": "Zero-shot classification", "linear_probe": "Linear probe", "knn": "Nearest neighbours"}
INCIDENTS = {"non_finite": "step skipped", "damaged_checkpoint": "checkpoint damaged",
             "save_failed": "checkpoint not written", "evaluation_failed": "results not written"}

MAX_CLASSES = 30  # in a confusion matrix; of more, those with the most errors
MAX_ROWS = 12  # classes and confusions in a table
MAX_IMAGES, SIDE = 10, 224  # SIDE in pixels: more is not visible at the size shown

SECTIONS = (
    ("results", "Results"), ("classes", "Class by class"), ("robustness", "With fewer patches"),
    ("looks", "What the model looks at"), ("curves", "Training curves"), ("retrievals", "Best and worst retrievals"),
    ("recipe", "Recipe and command"), ("skipped", "Skipped samples"), ("incidents", "Incidents"),
    ("environment", "Environment"),
)

# title, part of an evaluation's record, key in it, format
Column = tuple[str, str, str, Callable[[float | None], str]]

_IMAGES: Column = ("images", "counts", "pictures", count)
_OF_CLASSES: list[Column] = [
    *[(words, "metrics", key, percent) for key, words in ACCURACIES.items()],
    ("chance top-1", "chance", "top1", percent), ("training images", "counts", "training_pictures", count), _IMAGES,
    ("classes", "counts", "classes", count)]
TABLES: dict[str, tuple[str, list[Column]]] = {
    "retrieval": ("Retrieval", [
        ("R@1", "metrics", "{}_r1", percent), ("R@5", "metrics", "{}_r5", percent),
        ("R@10", "metrics", "{}_r10", percent), ("median rank", "metrics", "{}_median_rank", compact),
        ("chance R@1", "chance", "{}_r1", percent), _IMAGES, ("captions", "counts", "captions", count)]),
    **{name: (title, _OF_CLASSES) for name, title in CLASSIFIERS.items()},
    "calibration": ("Calibration", [
        ("calibration error", "metrics", "ece", percent), ("negative log-likelihood", "metrics", "nll", compact),
        ("mean confidence", "metrics", "confidence", percent), ("accuracy", "metrics", "accuracy", percent),
        ("chance NLL", "chance", "nll", compact), _IMAGES, ("classes", "counts", "classes", count)]),
}

Table = tuple[str, list[str], list[list[str]], int]  # title, head, rows, first numeric column


def write_report(folder: Path) -> Path:
    """Write the page of a run, `report.html`, or of a comparison, `index.html`, into its folder; return its path.

    A folder that holds neither is a `ConfigError`; what else is missing or damaged is named on the page.
    """
    if (folder / "comparison.json").exists():
        from aclip.report.comparison import write_comparison

        return write_comparison(folder)
    run = read_run(folder)
    shown = {key: value for key, value in run.config.items() if key not in ("dataflow", "command", "versions")}
    optional = {"classes": run.details, "robustness": run.robustness, "incidents": run.incidents}
    # a model without text has the probes alone
    leading = next(filter(None, (_leading(run.evaluations, evaluator) for evaluator in PRIMARY)), {})
    label, bad = folder.resolve().name, {record["key"]: record["reason"] for record in reversed(run.skipped)}
    return write_page(
        folder / "report.html", "run", name=str(mapping(run.config, "recipe").get("name") or label), folder=label,
        sections=[(anchor, title) for anchor, title in SECTIONS if optional.get(anchor, True)], notes=run.notes,
        configuration=json.dumps(shown, indent=2, ensure_ascii=False) if shown else "", run=run,
        leading=leading, at_start={name: at_start(run.evaluations, record) for name, record in leading.items()},
        results=results(run.evaluations),
        confusions=[_confusions(one) for one in run.details if "confusions" in one],
        diagrams=[_reliability(one) for one in run.details if "reliability" in one],
        robustness=robustness(run.robustness), looks=looks(run), curves=training_curves(run.metrics),
        retrievals=retrievals(run), skipped=bad,
        reasons=Counter(map(category, bad.values())).most_common(8),
        incident_kinds=Counter(record["kind"] for record in run.incidents).most_common(),
        names={**INCIDENTS, **CLASSIFIERS})


def report(folder: Path) -> Path:
    """Write the page of a run, `report.html`, or of a comparison, `index.html`, and print where it is.

    Args:
        folder: of a run or a comparison, in any state.

    Returns:
        The path of the page.
    """
    from rich.console import Console

    path = write_report(folder)
    Console(highlight=False).print(f"report: {path}", markup=False, soft_wrap=True)
    return path


def results(evaluations: Sequence[Record]) -> dict[str, Any]:
    others = dict.fromkeys(str(record.get("evaluator", "?")) for record in evaluations)
    tables = [*(_table(evaluations, evaluator) for evaluator in TABLES),
              *(_plain_table(evaluations, evaluator) for evaluator in others if evaluator not in TABLES)]
    return {"tables": [table for table in tables if table[2]], "curves": _metric_curves(evaluations)}


def robustness(records: Sequence[Record]) -> dict[str, Any]:
    curves: dict[tuple[str, str, str], dict[str, dict[float, Record]]] = {}
    for record in records:  # later ones replace earlier ones
        keep = number(record, "keep")
        if keep is not None and str(record.get("evaluator")) in PRIMARY:
            key = (str(record.get("set")), str(record.get("evaluator")), str(record.get("weights")))
            curves.setdefault(key, {}).setdefault(str(record.get("kept_by")), {})[keep] = record
    charts, rows = [], []
    for (name, evaluator, weights), ways in curves.items():
        metric = PRIMARY[evaluator]
        words = {"image_to_text_r1": "image → caption R@1", "top1": "top-1"}[metric]
        title = f"{evaluator.replace('_', ' ')}, {words}"
        whole = {keep: record for way in ways.values() for keep, record in way.items() if keep == 1.0}
        series = [Series(way, [(100.0 * keep, number(mapping(record, "metrics"), metric))
                               for keep, record in sorted((found | whole).items())], colour)
                  for colour, (way, found) in enumerate(ways.items(), start=1)]
        charts.append(line_chart(name, series, unit="%", from_zero=True, x_label="% of the patches kept",
                                 note=f"{title}, {weights} weights", last_values=False))  # equal at 100 %
        rows += [[name, title, percent(keep), MISSING if keep == 1.0 else way,
                  percent(number(mapping(record, "metrics"), metric)),
                  f"{count(number(record, 'num_keep'))} of {count(number(record, 'num_patches'))}",
                  compact(number(record, "pictures_per_second"))]
                 for way, found in ways.items() for keep, record in found.items()]
    return {"charts": charts, "rows": rows}


def looks(run: RunFiles) -> dict[str, Any] | None:
    if not run.snapshots:
        return None
    from aclip.report.snapshots import heat_layer, to_image, veil_layer

    last = run.snapshots[-1]
    shots = [shot for shot in run.snapshots if shot.captions == last.captions]
    rows = [{"caption": caption, "image": to_image(last.images[i], SIDE),
             "map": None if last.maps is None else heat_layer(last.maps[i], last.grid), "columns": [
        {"step": shot.step, "heat": heat_layer(shot.scores[i], shot.grid),
         "veil": veil_layer(shot.keep_indices[i], shot.grid),
         "fraction": float(shot.scores[i][shot.keep_indices[i]].sum()) / (float(shot.scores[i].sum()) or math.nan)}
        for shot in shots]} for i, caption in enumerate(last.captions[:MAX_IMAGES])]
    return {"steps": [shot.step for shot in shots], "rows": rows, "kept": last.keep_indices.shape[1],
            "patches": last.scores.shape[1], "mapped": last.maps is not None}


def training_curves(records: Sequence[Record]) -> dict[str, list[Markup]]:
    names = list(dict.fromkeys(name for record in records for name in mapping(record, "parts")))
    # placed at their step: a part holds its value alone
    parts = [mapping(r, "parts") | {"samples_seen": r.get("samples_seen")} for r in records]
    terms = [line for i, name in enumerate(names) for line in _smoothed(name, _points(parts, name), 1 + i % 6)]
    terms.append(Series("chance", _points(records, "chance_loss"), 0, "dashed"))
    logged = {name: _points(records, name) for name in (
        "loss", "lr", "ema_momentum", "logit_scale", "grad_norm", "samples_per_second", "data_wait")}
    return {"large": [
        line_chart("Loss", _smoothed("weighted sum", logged["loss"], 1), note="smoothed; raw values behind it"),
        line_chart("Terms of the loss", terms, note="unweighted; chance is the contrastive term of a uniform guess: "
                                                    "ln(batch size), or less where captions are equal"),
    ], "small": [
        line_chart("Learning rate", [Series("learning rate", logged["lr"])], from_zero=True),
        line_chart("EMA momentum", [Series("momentum", logged["ema_momentum"], 3)], digits=5),
        line_chart("Logit scale", [Series("logit scale", logged["logit_scale"], 4)]),
        line_chart("Gradient norm", _smoothed("gradient norm", logged["grad_norm"], 2), from_zero=True),
        line_chart("Throughput", _smoothed("samples / s", logged["samples_per_second"], 3), from_zero=True),
        line_chart("Waiting for data", _smoothed("fraction of the time", logged["data_wait"], 5), unit="%",
                   from_zero=True)]}


def retrievals(run: RunFiles) -> list[dict[str, Any]]:
    """Return the best and worst retrievals of every set, sets in the order of their evaluation."""
    evaluated = {as_file_name(name): name for name in (str(record.get("set", "?")) for record in run.evaluations)}
    order = list(evaluated)
    files = sorted(run.examples, key=lambda file: order.index(file) if file in evaluated else len(order))
    return [{"set": evaluated.get(file, file), **{kind: [one for one in run.examples[file] if one["kind"] == kind]
                                                  for kind in ("best", "worst")}} for file in files]


def _last_by_set(evaluations: Sequence[Record], evaluator: str) -> dict[tuple[str, str], Record]:
    last: dict[tuple[str, str], Record] = {}
    for record in evaluations:
        if record.get("evaluator") == evaluator:
            last[str(record.get("set", "?")), str(record.get("weights", "online"))] = record
    sets = list(dict.fromkeys(name for name, _ in last))  # in the order of their evaluation; of each, online leads
    return dict(sorted(last.items(), key=lambda item: (sets.index(item[0][0]), item[0][1] != "online")))


def _leading(evaluations: Sequence[Record], evaluator: str) -> dict[str, Record]:
    leading: dict[str, Record] = {}
    for (name, _), record in _last_by_set(evaluations, evaluator).items():
        leading.setdefault(name, record)
    return leading


def _table(evaluations: Sequence[Record], evaluator: str) -> Table:
    title, columns = TABLES[evaluator]
    rows = []
    for (name, weights), record in _last_by_set(evaluations, evaluator).items():
        settings, start = mapping(record, "settings"), at_start(evaluations, record)
        labels = [str(record.get("training_set") or MISSING),
                  ", ".join(f"{key} {compact(number(settings, key))}" for key in settings) or MISSING]
        for direction, words in (DIRECTIONS if evaluator == "retrieval" else {"": MISSING}).items():
            cells = []
            for _, part, key, write in columns:
                metric = key.format(direction)
                value = number(mapping(record, part), metric)
                before = number(start, metric) if part == "metrics" else None
                cells.append(write(value) + change(value, before, is_fraction(metric)))
            rows.append([name, weights, words, *labels, *cells])
    head = ["set", "weights", "direction", "learned from", "settings", *(column[0] for column in columns)]
    optional = ("direction", "learned from", "settings", "training images")
    shown = [i for i, word in enumerate(head) if word not in optional or any(row[i] != MISSING for row in rows)]
    return title, [head[i] for i in shown], [[row[i] for i in shown] for row in rows], sum(i < 5 for i in shown)


def _plain_table(evaluations: Sequence[Record], evaluator: str) -> Table:  # such as a user's
    rows = [[name, weights, metric, compact(number(mapping(record, "metrics"), metric))]
            for (name, weights), record in _last_by_set(evaluations, evaluator).items()
            for metric in mapping(record, "metrics")]
    return evaluator, ["set", "weights", "metric", "value"], rows, 3


def _metric_curves(evaluations: Sequence[Record]) -> list[Markup]:
    lines = {
        "retrieval": [("image_to_text_r1", "to caption R@1", 1), ("image_to_text_r5", "to caption R@5", 3),
                      ("text_to_image_r1", "to image R@1", 2), ("text_to_image_r5", "to image R@5", 4)],
        **{name: [(key, words, i) for i, (key, words) in enumerate(ACCURACIES.items(), start=1)]
           for name in CLASSIFIERS},
    }
    charts = []
    for evaluator, metrics in lines.items():
        for set_name, leading in _leading(evaluations, evaluator).items():
            same = ("evaluator", "set", "weights")
            history = [r for r in evaluations if all(r.get(key) == leading.get(key) for key in same)]
            if len({number(r, "samples_seen") for r in history}) < 2:
                continue
            values, levels = ([mapping(r, part) | {"samples_seen": r.get("samples_seen")} for r in history]
                              for part in ("metrics", "chance"))
            series = [Series(words, _points(values, key), colour) for key, words, colour in metrics]
            series.append(Series(f"chance {metrics[0][1].split()[-1]}", _points(levels, metrics[0][0]), 0, "dashed"))
            what = [CLASSIFIERS[evaluator].lower()] if evaluator in CLASSIFIERS else []
            charts.append(line_chart(set_name, series, unit="%", from_zero=True,
                                     note=", ".join([*what, f"{leading.get('weights', 'online')} weights"])))
    return charts


def _points(records: Sequence[Record], key: str) -> Points:
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


def _confusions(details: Record) -> dict[str, Any]:
    """Return the confusion matrix of the classes with the most errors, the worst classes, and the worst confusions."""
    names, images, right = (details[key] for key in ("classes", "pictures", "right"))
    wrong = [cell for cell in details["confusions"] if images[cell[0]]]
    present = [i for i, n in enumerate(images) if n]
    worst = sorted(present, key=lambda i: (right[i] / images[i], -images[i], i))
    shown = sorted(sorted(present, key=lambda i: (right[i] - images[i], i))[:MAX_CLASSES])
    place = {i: position for position, i in enumerate(shown)}
    squares = [(place[i], place[i], "right", right[i] / images[i],
                f"{names[i]}: {count(right[i])} of {count(images[i])} right") for i in shown if right[i]]
    squares += [(place[j], place[i], "wrong", n / images[i],
                 f"{names[i]} taken for {names[j]}: {count(n)} of {count(images[i])}")
                for i, j, n in wrong if n and i in place and j in place]
    return {
        "title": f"{details.get('set', '?')}, {str(details.get('evaluator', '?')).replace('_', ' ')}",
        "note": f"; the {len(shown)} of {count(len(present))} classes with the most errors"
        if len(shown) < len(present) else "",
        "labels": [names[i] for i in shown], "squares": squares,
        "worst": [[names[i], percent(right[i] / images[i]), count(images[i])] for i in worst[:MAX_ROWS]],
        "confused": [[names[i], names[j], count(n), percent(n / images[i])] for i, j, n in wrong[:MAX_ROWS]],
    }


def _reliability(details: Record) -> Markup:
    points = [(100.0 * one["confidence"], one["accuracy"]) for one in details["reliability"]]
    return line_chart(
        str(details.get("set", "?")),
        [Series("accuracy", points), Series("perfectly calibrated", [(0.0, 0.0), (100.0, 1.0)], 0, "dashed")],
        unit="%", from_zero=True, note=f"logit_scale {compact(number(details, 'logit_scale'))}",
        x_label="confidence, %", last_values=False)

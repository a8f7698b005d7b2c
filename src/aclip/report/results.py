"""The results: headline numbers, a table per ability, and how each set's metrics grew over training."""

from collections.abc import Sequence

from aclip.report.charts import Series, line_chart
from aclip.report.formats import MISSING, compact, count, duration, percent
from aclip.report.markup import Html, join, table, tag
from aclip.report.run_files import Record, RunFiles, mapping, number

DIRECTIONS = (("image_to_text", "image → caption"), ("text_to_image", "caption → image"))

CLASSIFIERS = (("zero_shot", "Zero-shot classification"), ("linear_probe", "Linear probe"),
               ("knn", "Nearest neighbours"))

_CALIBRATION = (("ece", percent), ("nll", compact), ("confidence", percent), ("accuracy", percent))

_ACCURACIES = (("top1", "top-1", 1), ("top5", "top-5", 2), ("mean_per_class", "mean per class", 3))
_RULE = ("R@k is the share of queries whose right answer is among the first k. A caption is right when it is "
         "the picture's own, a picture when it has the caption. Ties count as misses.")
_WEIGHTS = ("online", "ema")  # in the order in which they are shown; the first that was evaluated leads


def last_by_set(evaluations: Sequence[Record], evaluator: str) -> dict[tuple[str, str], Record]:
    """Return the last evaluation of every (set, weights), sets in the order of their first evaluation."""
    sets: dict[str, None] = {}
    last: dict[tuple[str, str], Record] = {}
    for record in evaluations:
        if record.get("evaluator") == evaluator:
            name, weights = str(record.get("set", "?")), str(record.get("weights", "online"))
            sets.setdefault(name)
            last[name, weights] = record
    rank = {weights: i for i, weights in enumerate(_WEIGHTS)}
    order = sorted(last, key=lambda key: (list(sets).index(key[0]), rank.get(key[1], len(rank)), key[1]))
    return {key: last[key] for key in order}


def headline(run: RunFiles) -> Html:
    """Return the header: what was trained, the main number of every held-out set, and the time it took."""
    recipe = mapping(run.config, "recipe")
    name = str(recipe.get("name") or "A run")
    sources = run.config.get("data")
    named = [run.config.get("model"), *(sources if isinstance(sources, list) else [sources])]
    what = [str(one) for one in named if one]
    # the ability that comes first here speaks for the run: a model without text has the probes alone
    abilities = (_leading(run.evaluations, name) for name in ("retrieval", *(name for name, _ in CLASSIFIERS)))
    tiles = [_tile(set_name, record) for set_name, record in next(filter(None, abilities), [])]
    last = run.metrics[-1] if run.metrics else {}
    seconds, seen = run.training_seconds(), number(last, "samples_seen")
    facts = [
        ("training time", duration(seconds)),
        ("samples seen", count(seen)),
        ("samples / s", compact(seen / seconds if seconds and seen else None)),
        ("steps", count(number(last, "step"))),
        ("batch size", count(number(run.config, "batch_size"))),
        ("loss", compact(number(last, "loss"))),
    ]
    return tag(
        "header",
        tag("p", "attentive-clip · training report", class_="kicker"),
        tag("h1", name),
        tag("p", str(recipe["title"]), class_="lead") if recipe.get("title") else None,
        tag("p", " on ".join(what), class_="sub") if what else None,
        tag("div", *tiles, class_="tiles") if tiles else None,
        tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts if v != MISSING),
            class_="facts"),
    )


def results(run: RunFiles) -> Html:
    """Return the tables of final results and the metric curves of every set."""
    evaluations = run.evaluations
    parts = [_retrieval_table(evaluations), *(_classifier_table(evaluations, *one) for one in CLASSIFIERS),
             _calibration_table(evaluations), *_other_tables(evaluations)]
    if not any(parts):
        return tag("p", "Nothing has been evaluated yet.", class_="missing")
    curves = _metric_curves(evaluations)
    return join(*parts, tag("div", *curves, class_="charts") if curves else None)


def _leading(evaluations: Sequence[Record], evaluator: str) -> list[tuple[str, Record]]:
    """Return each set's last evaluation with the weights that lead."""
    leading: dict[str, Record] = {}
    for (name, _), record in last_by_set(evaluations, evaluator).items():
        leading.setdefault(name, record)
    return list(leading.items())


def _tile(set_name: str, record: Record) -> Html:
    metrics, chance = mapping(record, "metrics"), mapping(record, "chance")
    first, second, labels, among = "image_to_text_r1", "image_to_text_r5", ("R@1", "R@5"), "captions"
    if first not in metrics:
        title = dict(CLASSIFIERS).get(str(record.get("evaluator")), "classification").lower()
        first, second, labels, among = "top1", "top5", (f"top-1, {title}", "top-5"), "classes"
    against = f"{count(number(mapping(record, 'counts'), among))} {among}"
    value, level = number(metrics, first), number(chance, first)
    times = f"{compact(value / level, 2)} × " if value and level else ""  # noqa: RUF001
    return tag(
        "div",
        tag("h3", set_name),
        tag("p", tag("b", percent(value)), tag("span", labels[0]), class_="big"),
        tag("p", tag("b", percent(number(metrics, second))), tag("span", labels[1]), class_="small")
        if number(metrics, second) is not None else None,
        tag("p", f"{times}chance ({percent(level)}, {against})", class_="chance") if level else None,
        class_="tile",
    )


def _retrieval_table(evaluations: Sequence[Record]) -> Html:
    rows = []
    for (name, weights), record in last_by_set(evaluations, "retrieval").items():
        metrics, chance, counts = (mapping(record, part) for part in ("metrics", "chance", "counts"))
        for key, words in DIRECTIONS:
            shares = [percent(number(metrics, f"{key}_r{k}")) for k in (1, 5, 10)]
            rows.append([name, weights, words, *shares, compact(number(metrics, f"{key}_median_rank")),
                         percent(number(chance, f"{key}_r1")), count(number(counts, "pictures")),
                         count(number(counts, "captions"))])
    head = ["set", "weights", "direction", "R@1", "R@5", "R@10", "median rank", "chance R@1", "pictures",
            "captions"]
    if not rows:
        return Html("")
    return join(tag("h3", "Retrieval"), table(head, rows, numeric_from=3), tag("p", _RULE, class_="note"))


def _classifier_table(evaluations: Sequence[Record], evaluator: str, title: str) -> Html:
    found = last_by_set(evaluations, evaluator)
    learns = any(record.get("training_set") for record in found.values())
    rows = []
    for (name, weights), record in found.items():
        metrics, chance, counts, settings = (
            mapping(record, part) for part in ("metrics", "chance", "counts", "settings"))
        fitted = ", ".join(f"{key} {compact(number(settings, key))}" for key in settings)
        learned = [str(record.get("training_set") or MISSING), fitted or MISSING] if learns else []
        on = [count(number(counts, "training_pictures"))] if learns else []
        rows.append([name, weights, *learned, *(percent(number(metrics, key)) for key, *_ in _ACCURACIES),
                     percent(number(chance, "top1")), *on, count(number(counts, "pictures")),
                     count(number(counts, "classes"))])
    head = ["set", "weights", *(["learned from", "settings"] if learns else []),
            *(words for _, words, _ in _ACCURACIES), "chance top-1", *(["training pictures"] if learns else []),
            "pictures", "classes"]
    if not rows:
        return Html("")
    return join(tag("h3", title), table(head, rows, numeric_from=4 if learns else 2))


def _calibration_table(evaluations: Sequence[Record]) -> Html:
    rows = []
    for (name, weights), record in last_by_set(evaluations, "calibration").items():
        metrics, counts = mapping(record, "metrics"), mapping(record, "counts")
        rows.append([name, weights, *(write(number(metrics, key)) for key, write in _CALIBRATION),
                     compact(number(mapping(record, "chance"), "nll")), count(number(counts, "pictures")),
                     count(number(counts, "classes"))])
    head = ["set", "weights", "calibration error", "negative log-likelihood", "mean confidence", "accuracy",
            "chance NLL", "pictures", "classes"]
    return join(tag("h3", "Calibration"), table(head, rows, numeric_from=2)) if rows else Html("")


def _other_tables(evaluations: Sequence[Record]) -> list[Html]:
    """Return a plain table for every evaluator that this page has no words for."""
    tables = []
    for evaluator in dict.fromkeys(str(record.get("evaluator", "?")) for record in evaluations):
        if evaluator in ("retrieval", "calibration", *(name for name, _ in CLASSIFIERS)):
            continue
        rows = [[name, weights, metric, compact(number(mapping(record, "metrics"), metric))]
                for (name, weights), record in last_by_set(evaluations, evaluator).items()
                for metric in mapping(record, "metrics")]
        if rows:
            tables.append(join(tag("h3", evaluator),
                               table(["set", "weights", "metric", "value"], rows, numeric_from=3)))
    return tables


def _metric_curves(evaluations: Sequence[Record]) -> list[Html]:
    lines = {
        "retrieval": (("image_to_text_r1", "to caption R@1", 1), ("image_to_text_r5", "to caption R@5", 6),
                      ("text_to_image_r1", "to image R@1", 2), ("text_to_image_r5", "to image R@5", 5)),
        **{name: _ACCURACIES for name, _ in CLASSIFIERS},
    }
    charts = []
    for evaluator, metrics in lines.items():
        for set_name, leading in _leading(evaluations, evaluator):
            same = ("evaluator", "set", "weights")
            history = [r for r in evaluations if all(r.get(key) == leading.get(key) for key in same)]
            if len({number(r, "samples_seen") for r in history}) < 2:
                continue
            series = [Series(words, _over_samples(history, "metrics", key), colour)
                      for key, words, colour in metrics]
            level = _over_samples(history, "chance", metrics[0][0])
            series.append(Series(f"chance {metrics[0][1].split()[-1]}", level, 0, "dashed"))
            what = [title.lower() for name, title in CLASSIFIERS if name == evaluator]
            charts.append(line_chart(set_name, series, unit="%", from_zero=True,
                                     note=", ".join([*what, f"{leading.get('weights', 'online')} weights"])))
    return charts


def _over_samples(records: Sequence[Record], part: str, key: str) -> list[tuple[float, float]]:
    points = ((number(r, "samples_seen"), number(mapping(r, part), key)) for r in records)
    return [(x, y) for x, y in points if x is not None and y is not None]

"""The tables and the page of a comparison: `table.md`, `table.csv` and `index.html`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from aclip.errors import CheckpointError, ConfigError
from aclip.report.figures import Points, Series, line_chart
from aclip.report.journals import PRIMARY, Metric, Record, mapping, number, primary, read_run
from aclip.report.page import MISSING, compact, count, duration, gigabytes, write_page, write_text
from aclip.report.tables import (
    Results,
    cells,
    costs,
    exceeds_spread,
    full_words,
    is_fraction,
    metric_words,
    metrics_of,
    milliseconds,
    ratio,
    scores,
    to_csv,
    to_markdown,
    to_rich,
)

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table

    from aclip.report.snapshots import Snapshot

PAGE = "index.html"
MANY = 8  # more recipes get no tiles, and numbers instead of names as columns
COLOURS = 12
IMAGES = 6
SIDE = 160  # pixels

SECTIONS = (
    ("results", "Results"), ("differences", "Differences"), ("curves", "Curves"), ("kept", "What each recipe keeps"),
    ("cost", "Time, arithmetic, memory"), ("lr", "Learning rates"), ("runs", "Runs"), ("recipe", "Command"),
)


@dataclass(frozen=True)
class ComparisonFiles:
    """The contents of a comparison's folder.

    Attributes:
        path: the folder.
        raw: `comparison.json`, with the step times of `timing.json`.
        results: of every recipe, in the order asked for.
    """

    path: Path
    raw: Record
    results: list[Results]

    @property
    def runs(self) -> list[Record]:
        """All runs, finished or not."""
        return list(self.raw.get("runs") or [])

    @property
    def sets(self) -> list[str]:
        """Names of the held-out sets."""
        return [str(name) for name in self.raw.get("sets") or []]

    @property
    def baseline(self) -> str:
        """The recipe that times and arithmetic are relative to."""
        return str(self.raw.get("baseline", "clip"))

    @property
    def seeds(self) -> list[int]:
        """The seeds, the first of which has searched for the learning rate."""
        return list(mapping(self.raw, "settings").get("seeds") or [])

    @cached_property
    def scores(self) -> "DataFrame":
        """What was measured; see `tables.scores`."""
        return scores(self.results, self.sets)

    @cached_property
    def metrics(self) -> dict[tuple[str, str], list[Metric]]:
        """The metrics by set and evaluator; the first of each leads."""
        return metrics_of(self.scores)

    @cached_property
    def values(self) -> dict[Metric, dict[str, list[float]]]:
        """Metric -> recipe -> its values over seeds."""
        found: dict[Metric, dict[str, list[float]]] = {}
        for row in self.scores.to_dict("records"):
            found.setdefault((row["set"], row["evaluator"], row["metric"]), {})[row["recipe"]] = row["values"]
        return found

    def primary(self) -> Metric | None:
        """Return the metric that stands for the recipes: on the first set, the first of `PRIMARY` that any has."""
        wanted = ((held, *metric) for held in self.sets for metric in PRIMARY.items())
        return next((metric for metric in wanted if metric in self.values), None)

    def summary(self, *, brief: bool = False) -> "DataFrame":
        """Return the table that leads: the first metric of every set and evaluator, costs, learning rate, seeds."""
        several = len(self.sets) > 1
        titles = {metrics[0]: full_words(metrics[0], with_set=several) for metrics in self.metrics.values()}
        table = cells(self.results, self.scores, titles)
        table = table.merge(costs(self.results, self.baseline, brief=brief), on="recipe")
        return table.assign(lr=[MISSING if one.lr is None else f"{one.lr:g}" for one in self.results],
                            seeds=[str(len(one.runs)) for one in self.results])

    def details(self) -> dict[str, "DataFrame"]:
        """Return all metrics of each set and evaluator, of the recipes that were measured so."""
        tables = {}
        for (held, evaluator), metrics in self.metrics.items():
            table = cells(self.results, self.scores, {metric: metric_words(metric[2]) for metric in metrics})
            measured = (table.drop(columns="recipe") != MISSING).any(axis=1)
            tables[f"{held}, {evaluator.replace('_', ' ')}"] = table[measured]
        return tables

    def notes(self) -> list[str]:
        """Return what is missing, and what lies in the folder without being part of the comparison."""
        runs = self.runs
        known = {str(run.get("name")) for run in runs}
        found = (
            ("Failed, and left out: {}.", [run for run in runs if run.get("error") and not run.get("finished")]),
            ("Not finished yet, and left out: {}.",
             [run for run in runs if not run.get("finished") and not run.get("error")]),
            ("Trained, but not measured with every evaluator; what was measured counts: {}.",
             [run for run in runs if run.get("finished") and not run.get("complete", True)]),
            ("Runs in the folder that the command does not name, not shown: {}.",
             [{"name": path.name} for path in sorted((self.path / "runs").glob("*")) if path.name not in known]),
        )
        return [sentence.format(", ".join(str(run.get("name")) for run in some)) for sentence, some in found if some]


def read_comparison(folder: Path) -> ComparisonFiles:
    """Read a comparison, finished or not.

    Raises:
        ConfigError: there is none in the folder, or its file is damaged.
    """
    raw = _read(folder / "comparison.json")
    if raw is None:
        raise ConfigError(f"there is no comparison in '{folder}': it has no comparison.json")
    raw["timing"] = _read(folder / "timing.json") or {}  # may be newer than the one in comparison.json
    comparison = ComparisonFiles(folder, raw, [])
    finished = [run for run in comparison.runs if run.get("finished")]
    for name, about in mapping(raw, "recipes").items():
        own = [run for run in finished if run.get("recipe") == name]
        comparison.results.append(Results(
            name=name, lr=number(mapping(mapping(raw, "chosen_lr"), name), "lr"),
            runs=sorted((run for run in own if run.get("counts")), key=lambda run: int(run["seed"])),
            search=[run for run in own if run.get("seed") in comparison.seeds[:1]],
            step_seconds=number(mapping(raw["timing"], "step_seconds"), name),
            relative_time=number(mapping(raw["timing"], "relative"), name),
            macs=number(about, "macs"), relative_cost=number(about, "relative_cost")))
    return comparison


def write_comparison(folder: Path) -> Path:
    """Write `table.md`, `table.csv` and the page `index.html` into a comparison's folder.

    Returns:
        The page.

    Raises:
        ConfigError: there is no comparison in the folder, or its file is damaged.
    """
    comparison = read_comparison(folder)
    tables = [to_markdown(comparison.summary()),
              *(f"## {title}\n\n{to_markdown(table)}" for title, table in comparison.details().items())]
    write_text(folder / "table.md", "\n".join(tables))
    write_text(folder / "table.csv", to_csv(comparison.results, comparison.sets))
    name = folder.resolve().name
    return write_page(
        folder / PAGE, "comparison", name=f"{name}: a comparison", sections=SECTIONS, folder=name,
        notes=comparison.notes(), baseline=comparison.baseline, raw=comparison.raw,
        threads=threads(comparison.raw.get("threads")), headline=headline(comparison), results=_results(comparison),
        differences=differences(comparison), curves=curves(comparison), kept=kept(comparison), cost=cost(comparison),
        lr=learning_rates(comparison), runs=runs(comparison))


def summary_table(folder: Path) -> "Table":
    """Return the summary of a comparison for the terminal."""
    return to_rich(read_comparison(folder).summary(brief=True))


def headline(comparison: ComparisonFiles) -> dict[str, Any]:
    """Return what was compared on what, and the main number of every recipe."""
    raw, metric = comparison.raw, comparison.primary()
    names = [one.name for one in comparison.results]
    data = raw.get("data")
    tiles = []
    if metric and len(names) <= MANY:
        main = cells(comparison.results, comparison.scores, {metric: "main"})["main"]
        for one, cell in zip(comparison.results, main, strict=True):
            value, _, spread = cell.partition(" (n")[0].removesuffix(" %").partition(" ± ")
            tiles.append({"name": one.name, "value": f"{value} %" if "%" in cell else value, "spread": spread,
                          "time": ratio(one.relative_time), "macs": ratio(one.relative_cost)})
    return {
        "name": f"{len(names)} recipes" if len(names) > 3 else " · ".join(names),
        "what": f"{raw.get('model')} on {', '.join(map(str, data)) if isinstance(data, list) else data}",
        "metric": full_words(metric) if metric else "", "tiles": tiles,
        "facts": [
            ("budget", budget(mapping(raw, "settings"))),
            ("seeds", ", ".join(map(str, comparison.seeds))),
            ("pairs in the data", count(number(raw, "num_pairs"))),
            ("batch size", count(number(raw, "batch_size"))),
            ("precision", str(raw.get("precision", MISSING))),
            ("device", f"{raw.get('device', MISSING)}, {threads(raw.get('threads'))} a run"),
        ],
    }


def differences(comparison: ComparisonFiles) -> list[dict[str, Any]]:
    """Return a matrix of differences for the leading metric of every set and evaluator."""
    found = []
    for metrics in comparison.metrics.values():
        values = comparison.values[metrics[0]]
        names = columns = [one.name for one in comparison.results if one.name in values]
        if len(names) < 2:
            continue
        titles = names
        if len(names) > MANY:  # as wide as numbers, not as names
            columns = [str(i) for i in range(1, len(names) + 1)]
            titles = [" ".join(pair) for pair in zip(columns, names, strict=True)]
        rows = [[title, *(_difference(values[name], values[other], metrics[0]) if name != other else
                          Markup('<span class="again">{}</span>').format(MISSING) for other in names)]
                for title, name in zip(titles, names, strict=True)]
        found.append({"title": full_words(metrics[0]), "head": ["", *columns], "rows": rows})
    return found


def curves(comparison: ComparisonFiles) -> list[Markup]:
    """Return two charts of the primary metric, each seed faint behind the mean of its recipe."""
    metric = comparison.primary()
    if metric is None:
        return []
    clocks = {one.name: clock(comparison, one) for one in comparison.results}
    longest = max((clocks[one.name](1.0) for one in comparison.results if one.runs), default=0.0)
    unit, scale = ("seconds", 1.0) if longest < 300 else ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)
    by_samples: list[Series] = []
    by_time: list[Series] = []
    for i, one in enumerate(comparison.results):
        histories = [_history(comparison, run, metric) for run in one.runs]
        total = max(one.values("samples_seen"), default=0.0) or 1.0
        timed = [[(clocks[one.name](x / total) / scale, y) for x, y in points] for points in histories]
        colour = 0 if one.name == comparison.baseline else 1 + i % COLOURS
        by_samples += _series(one.name, histories, colour)
        by_time += _series(one.name, timed, colour)
    chance = next((level for one in comparison.results for run in one.runs if (level := number(
        mapping(mapping(mapping(run, "chance"), metric[0]), metric[1]), metric[2])) is not None), None)
    for lines in (by_samples, by_time):
        if lines and chance is not None:
            end = max(line.points[-1][0] for line in lines)
            lines.append(Series("chance", [(0.0, chance), (end, chance)], 0, "dashed"))
    words = full_words(metric)
    return [
        line_chart(f"{words} by pairs seen", by_samples, unit="%", from_zero=True, note="mean; seeds behind it"),
        line_chart(f"{words} by time in training steps", by_time, unit="%", from_zero=True,
                   note="steps at their measured time", x_label=unit)]


def clock(comparison: ComparisonFiles, one: Results) -> Callable[[float], float]:
    """Return a function from the fraction of a run that is done to the seconds of its steps so far.

    Every stage of a run (small images, masked, unmasked) has its own measured step time.
    """
    steps = max(one.values("total_steps"), default=0.0)
    stages = mapping(mapping(comparison.raw, "timing"), "stages").get(one.name) or [
        {"share": 1.0, "seconds": one.step_seconds or 0.0}]

    def seconds(fraction: float) -> float:
        total = 0.0
        for stage in stages:
            part = min(max(fraction, 0.0), stage["share"])
            total, fraction = total + part * steps * stage["seconds"], fraction - part
        return total

    return seconds


def kept(comparison: ComparisonFiles) -> dict[str, Any] | None:
    """Return images with what each masking recipe removes, at the end of training of the first seed.

    Recipes that remove nothing are named, not shown; None if there are no others.
    """
    shots = {one.name: shot for one in comparison.results if (shot := _last_snapshot(comparison, one)) is not None}
    masking = {name: shot for name, shot in shots.items() if shot.keep_indices.shape[1] < shot.scores.shape[1]}
    if not masking:
        return None
    from aclip.report.snapshots import to_image, veil_layer

    first = next(iter(masking.values()))
    shown = {name: shot for name, shot in masking.items() if shot.captions == first.captions}
    images = [
        {"caption": caption, "image": to_image(first.images[i], SIDE),
         "recipes": [{"name": name, "veil": veil_layer(shot.keep_indices[i], shot.grid),
                      "kept": f"{count(shot.keep_indices.shape[1])} of {count(shot.scores.shape[1])}"}
                     for name, shot in shown.items()]}
        for i, caption in enumerate(first.captions[:IMAGES])]
    return {"images": images, "whole": [name for name in shots if name not in masking], "figures": len(shown) + 1}


def cost(comparison: ComparisonFiles) -> dict[str, Any]:
    """Return measured step times with their quartiles, the arithmetic, and peak memory."""
    timing = mapping(comparison.raw, "timing")
    shown = {comparison.baseline, *(one.name for one in comparison.results)}
    steps = {label: step for label, step in mapping(timing, "steps").items() if label.split(", ")[0] in shown}
    rows = []
    for label, step in steps.items():
        low, median, high = (milliseconds(number(step, key)) for key in ("first_quartile", "median", "third_quartile"))
        rows.append([label, median, f"{low} to {high}", count(number(step, "rounds"))])
    return {"table": _table(costs(comparison.results, comparison.baseline)), "steps": rows,
            "warmup": timing.get("warmup_rounds", "?"), "device": timing.get("device", comparison.raw.get("device")),
            "threads": threads(timing.get("threads")), "batch_size": count(number(comparison.raw, "batch_size")),
            "text_tokens": compact(number(comparison.raw, "text_tokens"))}


def learning_rates(comparison: ComparisonFiles) -> dict[str, Any]:
    """Return every learning rate that was tried with its result, and which one was chosen."""
    lrs = sorted({float(run["lr"]) for run in comparison.runs})
    if len(mapping(comparison.raw, "settings").get("lr") or []) < 2:
        return {"rows": [], "single": f"{lrs[0]:g}" if len(lrs) == 1 else ""}
    metric, rows, sets = comparison.primary(), [], comparison.sets
    chosen = [mapping(mapping(comparison.raw, "chosen_lr"), one.name).get("set") for one in comparison.results]
    chosen_on = next((str(name) for name in chosen if name is not None), None)
    if chosen_on is not None:
        sets = [chosen_on, *sets]
    for one in comparison.results:
        found = {run["lr"]: value[1] for run in one.search if (value := primary(run, sets)) is not None}
        row: list[str] = [one.name]
        for lr in lrs:
            text = f"{100 * found[lr]:.1f} %" if lr in found else MISSING
            row.append(Markup("<b>{} ✓</b>").format(text) if lr == one.lr else text)
        rows.append(row)
    return {"rows": rows, "head": ["recipe", *(f"{lr:g}" for lr in lrs)], "seeds": comparison.seeds,
            "metric": full_words(metric) if metric else "the first set",
            "held_out": chosen_on if chosen_on not in comparison.sets else None}


def runs(comparison: ComparisonFiles) -> list[list[str]]:
    """Return every run with its state, and a link to its own report."""
    rows = []
    for run in comparison.runs:
        name, found = str(run.get("name")), primary(run, comparison.sets)
        report = f"runs/{name}/report.html"
        state = "failed" if run.get("error") else "done" if run.get("finished") else "not finished"
        rows.append([
            Markup('<a href="{}">{}</a>').format(report, name) if (comparison.path / report).exists() else name,
            f"{state}: {run['error']}" if run.get("error") else state,
            f"{100 * found[1]:.1f} %" if found else MISSING, count(number(run, "samples_seen")),
            duration(number(run, "training_seconds")), gigabytes(number(run, "peak_memory"))])
    return rows


def budget(settings: Record) -> str:
    """Return what every recipe was given."""
    epochs, samples, minutes = (number(settings, key) for key in ("epochs", "samples", "minutes"))
    if minutes is not None:
        return f"{minutes:g} minutes of training steps"
    return f"{samples:,.0f} pairs" if samples is not None else f"{epochs or 0:g} epochs"


def threads(number_of: object) -> str:
    """Return a number of threads in words."""
    return f"{MISSING if number_of is None else number_of} {'thread' if number_of == 1 else 'threads'}"


def _read(path: Path) -> Record | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: it holds no object")
    return found


def _results(comparison: ComparisonFiles) -> dict[str, Any]:
    return {"summary": _table(comparison.summary(brief=True)),
            "details": {title: _table(table) for title, table in comparison.details().items()}}


def _table(frame: "DataFrame") -> tuple[list[str], list[list[str]]]:
    return list(frame.columns), frame.to_numpy().tolist()


def _difference(first: Sequence[float], second: Sequence[float], metric: Metric) -> Markup:
    points = round((100.0 if is_fraction(metric) else 1.0) * (fmean(first) - fmean(second)), 1)
    text = f"{points + 0.0:+.1f}"  # + 0.0: no negative zero
    return Markup("<b>{}</b>" if exceeds_spread(first, second) else '<span class="within">{}</span>').format(text)


def _history(comparison: ComparisonFiles, run: Record, metric: Metric) -> Points:
    """Return (samples seen, value) of a run's evaluations."""
    try:
        evaluations = read_run(comparison.path / "runs" / str(run["name"]), journals_only=True).evaluations
    except ConfigError:
        return []
    held, evaluator, name = metric
    found: dict[float, float] = {}
    for record in evaluations:
        if (record.get("set"), record.get("evaluator"), record.get("weights")) == (held, evaluator, "online"):
            seen, value = number(record, "samples_seen"), number(mapping(record, "metrics"), name)
            if seen is not None and value is not None:
                found[seen] = value
    return sorted(found.items())


def _series(name: str, histories: list[Points], colour: int) -> list[Series]:
    """Return the seeds, and their mean where all of them were evaluated."""
    histories = [points for points in histories if points]
    if len(histories) < 2:
        return [Series(name, points, colour) for points in histories]
    values = [dict(points) for points in histories]
    mean = [(x, fmean(v[x] for v in values)) for x in sorted(set.intersection(*map(set, values)))]
    lines = [Series(name, points, colour, "faint") for points in histories]
    return [*lines, Series(name, mean, colour)] if mean else lines


def _last_snapshot(comparison: ComparisonFiles, one: Results) -> "Snapshot | None":
    """Return the last snapshot of the first of a recipe's runs, if it can be read."""
    from aclip.report.snapshots import read_snapshot

    for run in one.runs[:1]:
        paths = sorted((comparison.path / "runs" / str(run["name"]) / "snapshots").glob("step-*.safetensors"))
        if paths:
            try:
                return read_snapshot(paths[-1])
            except CheckpointError:
                return None
    return None

"""The tables and the page of a comparison: `table.md`, `table.csv` and `index.html`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from aclip.errors import CheckpointError, ConfigError
from aclip.report.figures import Points, Series, line_chart
from aclip.report.journals import Metric, Record, mapping, number, primary, read_journal, read_json
from aclip.report.page import count, write_page
from aclip.report.tables import Tables, exceeds_spread, full_words, is_fraction, to_rich

if TYPE_CHECKING:
    from rich.table import Table

    from aclip.report.snapshots import Snapshot

MANY = 8  # more recipes get no tiles, and numbers instead of names as columns
COLOURS, IMAGES, SIDE = 12, 6, 160  # SIDE in pixels

SECTIONS = (
    ("results", "Results"), ("differences", "Differences"), ("curves", "Curves"), ("kept", "What each recipe keeps"),
    ("cost", "Time, arithmetic, memory"), ("lr", "Learning rates"), ("runs", "Runs"), ("recipe", "Command"),
)


def read_comparison(folder: Path) -> Tables:
    """Read `comparison.json`; a `ConfigError` if it is missing or damaged."""
    damaged: list[str] = []
    raw = read_json(folder / "comparison.json", damaged)
    if not isinstance(raw, dict):
        raise ConfigError(f"there is no comparison in '{folder}': its comparison.json is "
                          f"{'damaged' if damaged else 'missing'}")
    raw["timing"] = read_json(folder / "timing.json", []) or {}  # may be newer than the one in comparison.json
    return Tables(raw)


def write_comparison(folder: Path) -> Path:
    """Write `table.md`, `table.csv` and the page `index.html` into a comparison's folder; return the page."""
    tables, name = read_comparison(folder), folder.resolve().name
    metric, chosen = tables.primary(), mapping(tables.raw, "chosen_lr").values()
    chosen_on = list(dict.fromkeys(str(one["set"]) for one in chosen if one.get("set")))
    tables.write(folder)
    return write_page(
        folder / "index.html", "comparison", name=f"{name}: a comparison", sections=SECTIONS, folder=name,
        notes=notes(folder, tables.raw["runs"]), raw=tables.raw, tables=tables, recipes=tables.recipes,
        baseline=tables.baseline, metric=metric, metric_words=full_words(metric) if metric else "",
        tiles=metric and len(tables.recipes) <= MANY, difference=difference, full_words=full_words, many=MANY,
        curves=curves(folder, tables, metric) if metric else [], kept=kept(folder, tables), chosen_on=chosen_on,
        primary=partial(primary, sets=tables.sets), searched=partial(primary, sets=[*chosen_on, *tables.sets]),
        reports={path.parent.name for path in folder.glob("runs/*/report.html")})


def summary_table(folder: Path) -> "Table":
    return to_rich(read_comparison(folder).summary(brief=True))


def notes(folder: Path, runs: Sequence[Record]) -> list[str]:
    found: dict[str, list[str]] = {"Failed, and left out": [], "Not finished yet, and left out": [],
                                   "Trained, but not measured with every evaluator; what was measured counts": []}
    failed, unfinished, in_part = found.values()
    for run in runs:
        if not run.get("finished"):
            (failed if run.get("error") else unfinished).append(run["name"])
        elif not run.get("complete", True):
            in_part.append(run["name"])
    found["Runs in the folder that the command does not name, not shown"] = sorted(
        {path.name for path in (folder / "runs").glob("*")} - {run["name"] for run in runs})
    return [f"{sentence}: {', '.join(names)}." for sentence, names in found.items() if names]


def curves(folder: Path, tables: Tables, metric: Metric) -> list[Markup]:
    clocks = {name: clock(tables, name) for name in tables.recipes}
    longest = max((clocks[name](1.0) for name in tables.recipes if tables.runs[name]), default=0.0)
    unit, scale = ("seconds", 1.0) if longest < 300 else ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)
    by_samples: list[Series] = []
    by_time: list[Series] = []
    for i, name in enumerate(tables.recipes):
        histories = [_history(folder / "runs" / str(run["name"]), metric) for run in tables.runs[name]]
        total = tables.cost(name, "samples_seen", "max") or 1.0
        timed = [[(clocks[name](x / total) / scale, y) for x, y in points] for points in histories]
        colour = 0 if name == tables.baseline else 1 + i % COLOURS
        by_samples += _series(name, histories, colour)
        by_time += _series(name, timed, colour)
    levels = [number(mapping(mapping(mapping(run, "chance"), metric[0]), metric[1]), metric[2])
              for some in tables.runs.values() for run in some]
    chance = next((level for level in levels if level is not None), None)
    for lines in (by_samples, by_time):
        if lines and chance is not None:
            end = max(line.points[-1][0] for line in lines)
            lines.append(Series("chance", [(0.0, chance), (end, chance)], 0, "dashed"))
    words = full_words(metric)
    return [
        line_chart(f"{words} by pairs seen", by_samples, unit="%", from_zero=True, note="mean; seeds behind it"),
        line_chart(f"{words} by time in training steps", by_time, unit="%", from_zero=True,
                   note="steps at their measured time", x_label=unit)]


def clock(tables: Tables, recipe: str) -> Callable[[float], float]:
    """Return a function from the fraction of a run that is done to the seconds of its steps so far.

    Every stage of a run (small images, masked, unmasked) has its own measured step time.
    """
    steps = max((number(run, "total_steps") or 0.0 for run in tables.runs[recipe]), default=0.0)
    stages = mapping(mapping(tables.raw, "timing"), "stages").get(recipe) or [
        {"share": 1.0, "seconds": tables.cost(recipe, "step_seconds") or 0.0}]

    def seconds(fraction: float) -> float:
        total = 0.0
        for stage in stages:
            part = min(max(fraction, 0.0), stage["share"])
            total, fraction = total + part * steps * stage["seconds"], fraction - part
        return total

    return seconds


def kept(folder: Path, tables: Tables) -> dict[str, Any] | None:
    """Return images with what each masking recipe removes, at the end of training of the first seed.

    Recipes that remove nothing are named, not shown; None if there are no others.
    """
    shots = {name: shot for name, runs in tables.runs.items() for run in runs[:1]
             if (shot := _last_snapshot(folder / "runs" / str(run["name"]))) is not None}
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


def difference(first: Sequence[float], second: Sequence[float], metric: Metric) -> Markup:
    points = round((100.0 if is_fraction(metric[2]) else 1.0) * (fmean(first) - fmean(second)), 1)
    text = f"{points + 0.0:+.1f}"  # + 0.0: no negative zero
    return Markup("<b>{}</b>" if exceeds_spread(first, second) else '<span class="within">{}</span>').format(text)


def _history(run: Path, metric: Metric) -> Points:
    held, evaluator, name = metric
    found: dict[float, float] = {}
    for record in read_journal(run / "evaluations.jsonl", []):
        if (record.get("set"), record.get("evaluator"), record.get("weights")) == (held, evaluator, "online"):
            seen, value = number(record, "samples_seen"), number(mapping(record, "metrics"), name)
            if seen is not None and value is not None:
                found[seen] = value
    return sorted(found.items())


def _series(name: str, histories: list[Points], colour: int) -> list[Series]:
    histories = [points for points in histories if points]
    if len(histories) < 2:
        return [Series(name, points, colour) for points in histories]
    values = [dict(points) for points in histories]
    mean = [(x, fmean(v[x] for v in values)) for x in sorted(set.intersection(*map(set, values)))]
    lines = [Series(name, points, colour, "faint") for points in histories]
    return [*lines, Series(name, mean, colour)] if mean else lines


def _last_snapshot(run: Path) -> "Snapshot | None":
    from aclip.report.snapshots import read_snapshot

    try:
        return read_snapshot(max((run / "snapshots").glob("step-*.safetensors")))
    except (ValueError, CheckpointError):  # there is none, or it is damaged
        return None

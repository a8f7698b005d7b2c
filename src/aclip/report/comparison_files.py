"""Read a comparison's results, recipe by recipe."""

import json
from dataclasses import dataclass
from pathlib import Path

from aclip.errors import ConfigError
from aclip.report.outcomes import PRIMARY, Metric
from aclip.report.run_files import Record, mapping, number


@dataclass(frozen=True)
class Results:
    """What the finished runs of one recipe say.

    Attributes:
        name, title: of the recipe.
        lr: of its runs, chosen or given; None before it is known.
        runs: those that count, as `comparison.json` holds them, by seed.
        search: all runs with the first seed, of every learning rate that was tried.
        metrics: metric -> its value in each of `runs`.
        step_seconds: median time of a step. relative_time: that over the baseline's, measured in turns with it.
        macs: multiply-accumulates a pair and step. relative_cost: that over the baseline's.
    """

    name: str
    title: str
    lr: float | None
    runs: list[Record]
    search: list[Record]
    metrics: dict[Metric, list[float]]
    step_seconds: float | None
    relative_time: float | None
    macs: float | None
    relative_cost: float | None

    def values(self, key: str) -> list[float]:
        """Return a number of the counted runs, of those that have it."""
        return [value for run in self.runs if (value := number(run, key)) is not None]


@dataclass(frozen=True)
class ComparisonFiles:
    """The contents of a comparison's folder.

    Attributes:
        path: the folder.
        raw: `comparison.json`, with the step times of `timing.json`.
        results: of every recipe, in the order asked for.
        sets: names of the held-out sets.
        metrics: all that were measured, sets in order.
    """

    path: Path
    raw: Record
    results: list[Results]
    sets: list[str]
    metrics: list[Metric]

    @property
    def baseline(self) -> str:
        """The recipe that times and arithmetic are relative to."""
        return str(self.raw.get("baseline", "clip"))

    def seeds(self) -> list[int]:
        """Return the seeds, the first of which has searched for the learning rate."""
        return list(mapping(self.raw, "settings").get("seeds", []))

    def lrs(self) -> list[float]:
        """Return all learning rates that were tried."""
        return sorted({float(run["lr"]) for run in self.raw.get("runs", [])})

    def searched(self) -> bool:
        """Return whether every recipe has tried several learning rates."""
        return len(mapping(self.raw, "settings").get("lr") or []) > 1

    def budget(self) -> str:
        """Return what every recipe was given."""
        settings = mapping(self.raw, "settings")
        epochs, samples, minutes = (number(settings, key) for key in ("epochs", "samples", "minutes"))
        if minutes is not None:
            return f"{minutes:g} minutes of training steps"
        return f"{samples:,.0f} pairs" if samples is not None else f"{epochs or 0:g} epochs"

    def notes(self) -> list[str]:
        """Return what is missing, and what lies in the folder without belonging to the comparison."""
        runs = self.raw.get("runs", [])
        failed = [str(run.get("name")) for run in runs if run.get("error") and not run.get("finished")]
        incomplete = [str(run.get("name")) for run in runs if run.get("finished") and not run.get("complete", True)]
        unfinished = [str(run.get("name")) for run in runs if not run.get("finished") and not run.get("error")]
        known = {str(run.get("name")) for run in runs}
        others = [path.name for path in sorted((self.path / "runs").glob("*")) if path.name not in known]
        sentences = (
            ("Failed, and left out: {}.", failed),
            ("Not finished yet, and left out: {}.", unfinished),
            ("Trained, but not measured with every evaluator; what was measured counts: {}.", incomplete),
            ("Other runs lie in the same folder and are not shown, for the command does not name them: {}.", others),
        )
        return [sentence.format(", ".join(names)) for sentence, names in sentences if names]

    def primary(self) -> Metric | None:
        """Return the metric that speaks for the recipes: on the first set, the first of `PRIMARY` that any has."""
        wanted = ((held, *metric) for held in self.sets for metric in PRIMARY)
        return next((metric for metric in wanted if metric in self.metrics), None)


def read_comparison(folder: Path) -> ComparisonFiles:
    """Read a comparison, finished or not.

    Raises:
        ConfigError: there is none in the folder, or its file is damaged.
    """
    raw = _read(folder / "comparison.json")
    if raw is None:
        raise ConfigError(f"there is no comparison in {folder}: it has no comparison.json")
    raw["timing"] = _read(folder / "timing.json") or {}  # may be newer than what the comparison was written with
    runs = [run for run in raw.get("runs", []) if run.get("finished")]
    results = [_results(raw, name, [run for run in runs if run.get("recipe") == name])
               for name in mapping(raw, "recipes")]
    sets = [str(name) for name in raw.get("sets", [])]
    found = dict.fromkeys(metric for one in results for metric in one.metrics)
    metrics = sorted(found, key=lambda metric: sets.index(metric[0]) if metric[0] in sets else len(sets))
    return ComparisonFiles(folder, raw, results, sets, metrics)


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


def _results(raw: Record, name: str, finished: list[Record]) -> Results:
    about, timing = mapping(mapping(raw, "recipes"), name), mapping(raw, "timing")
    runs = sorted((run for run in finished if run.get("counts")), key=lambda run: int(run["seed"]))
    first = mapping(raw, "settings").get("seeds", [None])[0]
    metrics: dict[Metric, list[float]] = {}
    for run in runs:
        for held, evaluators in mapping(run, "metrics").items():
            for evaluator, values in evaluators.items():
                for metric in values:
                    value = number(values, metric)
                    if value is not None:
                        metrics.setdefault((held, evaluator, metric), []).append(value)
    return Results(
        name=name, title=str(about.get("title", "")), lr=number(mapping(mapping(raw, "chosen_lr"), name), "lr"),
        runs=runs, search=[run for run in finished if run.get("seed") == first], metrics=metrics,
        step_seconds=number(mapping(timing, "step_seconds"), name),
        relative_time=number(mapping(timing, "relative"), name),
        macs=number(about, "macs"), relative_cost=number(about, "relative_cost"))
